"""The eight GLUE subsets of the paper's Table 2, as one string per row.

A row's columns are joined with their names, "sentence1: ... sentence2: ...", in one string.
Selection is on a seeded 5 % of train, reporting on validation, because test labels are not public.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cola.config.choices import Objective
from cola.config.schema import TaskConfig
from cola.errors import ConfigError
from cola.interfaces import Split, TaskData
from cola.tasks.collate import build_text_collator
from cola.tasks.encoding import TaskRequest, check_labels, encode_texts, require_tokenizer
from cola.tasks.sources import Row, choices_hint, hold_out, load_rows, train_name


@dataclass(frozen=True, kw_only=True)
class GlueSubset:
    """Static facts of a subset.

    Attributes:
        columns: text columns in the order in which they are joined.
        num_labels: classes; 1 means regression.
        metric: name of the judged metric.
        report: splits to report on, the main one first.
    """

    columns: tuple[str, ...]
    num_labels: int = 2
    metric: str = "accuracy"
    report: tuple[str, ...] = ("validation",)

    @property
    def objective(self) -> Objective:
        """Regression for a single label, else classification."""
        return Objective.regression if self.num_labels == 1 else Objective.classification


STATED_NUM_LABELS = 2
"""`task.num_labels` in conf/task/glue.yaml; a subset's own number takes its place."""

SUBSETS: dict[str, GlueSubset] = {
    "cola": GlueSubset(columns=("sentence",), metric="matthews_correlation"),
    "mnli": GlueSubset(
        columns=("premise", "hypothesis"),
        num_labels=3,
        report=("validation_matched", "validation_mismatched"),
    ),
    "sst2": GlueSubset(columns=("sentence",)),
    "mrpc": GlueSubset(columns=("sentence1", "sentence2")),
    "qnli": GlueSubset(columns=("question", "sentence")),
    "qqp": GlueSubset(columns=("question1", "question2")),
    "rte": GlueSubset(columns=("sentence1", "sentence2")),
    "stsb": GlueSubset(columns=("sentence1", "sentence2"), num_labels=1, metric="pearson"),
}


def resolve_subset(task: TaskConfig) -> GlueSubset:
    """The facts of `task.subset`.

    Raises:
        ConfigError: no such subset, or `task.num_labels` contradicts it.
    """
    name = task.subset or ""
    if name not in SUBSETS:
        raise ConfigError(
            f"task.subset={task.subset} is no GLUE subset; {choices_hint(name, list(SUBSETS))}"
        )
    subset = SUBSETS[name]
    if task.num_labels not in (STATED_NUM_LABELS, subset.num_labels):
        raise ConfigError(
            f"task.num_labels={task.num_labels}, but glue/{name} has {subset.num_labels}; "
            "leave task.num_labels out, the subset decides it"
        )
    return subset


def load_glue(request: TaskRequest) -> TaskData:
    """Read, split and encode one subset.

    Raises:
        ConfigError: the model has no tokenizer.
        DataError: a split is missing or cannot be read.
    """
    task = request.task
    subset = resolve_subset(task)
    limit = task.max_train_rows
    columns = (*subset.columns, "label")
    rows = load_rows(task, "train", columns=columns, data_dir=request.data_dir, limit=limit)
    train, selection = hold_out(rows, seed=request.split_seed)
    report, *extra = (
        _encode(
            name, load_rows(task, name, columns=columns, data_dir=request.data_dir), request, subset
        )
        for name in subset.report
    )
    return TaskData(
        name=f"glue/{task.subset}",
        problem=request.problem,
        train=_encode("train", train, request, subset),
        selection=_encode(f"5 % of {train_name(limit)}", selection, request, subset),
        report=report,
        extra_report=extra,
        collate=build_text_collator(task, subset.objective, require_tokenizer(request)),
        score=request.score,
    )


def join_columns(row: Row, columns: Sequence[str]) -> str:
    """A row as one string, e.g. "premise: A man sleeps. hypothesis: He is awake."."""
    return " ".join(f"{column}: {row[column]}" for column in columns)


def _encode(name: str, rows: Sequence[Row], request: TaskRequest, subset: GlueSubset) -> Split:
    """A split of tokens; labels are checked first, since that is cheap."""
    check_labels(rows, request.problem, f"glue/{request.task.subset} ({name})")
    encoded = encode_texts(
        [join_columns(row, subset.columns) for row in rows],
        [row["label"] for row in rows],
        tokenizer=require_tokenizer(request),
        max_length=request.problem.max_length,
    )
    return Split(name=name, rows=encoded)
