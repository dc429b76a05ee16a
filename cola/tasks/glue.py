"""The eight GLUE subsets of the paper's Table 2, as one string per row.

A row's columns are joined with their names, "sentence1: ... sentence2: ...", in one string.
Selection is on a seeded 5 % of train, reporting on validation, because test labels are not public.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from cola.config.choices import Objective
from cola.config.schema import TaskConfig
from cola.errors import ConfigError
from cola.task_data import Problem, TaskData
from cola.tasks.collate import build_text_collator
from cola.tasks.encoding import TaskRequest, require_tokenizer
from cola.tasks.fields import Fields
from cola.tasks.reading import read_split
from cola.tasks.sources import choices_hint
from cola.tasks.splits import NamedRows, first_rows, hold_out, train_name
from cola.tasks.text import LabelledRow, encode_labelled


@dataclass(frozen=True, kw_only=True)
class GlueSubset:
    """Static facts of a subset.

    Attributes:
        columns: text columns in the order in which they are joined.
        label_names: of the classes; none for regression.
        metric: name of the judged metric.
        report: splits to report on, the main one first.
    """

    columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metric: str = "accuracy"
    report: tuple[str, ...] = ("validation",)

    @property
    def num_labels(self) -> int:
        """Classes, or 1 for a value."""
        return len(self.label_names) or 1

    @property
    def objective(self) -> Objective:
        """Regression without classes."""
        return Objective.classification if self.label_names else Objective.regression


STATED_NUM_LABELS = 2
"""`task.num_labels` in conf/task/glue.yaml; a subset's own number takes its place."""

_ENTAILMENT = ("entailment", "not_entailment")
_DUPLICATE = ("not_duplicate", "duplicate")

SUBSETS: dict[str, GlueSubset] = {
    "cola": GlueSubset(
        columns=("sentence",),
        label_names=("unacceptable", "acceptable"),
        metric="matthews_correlation",
    ),
    "mnli": GlueSubset(
        columns=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
        report=("validation_matched", "validation_mismatched"),
    ),
    "sst2": GlueSubset(columns=("sentence",), label_names=("negative", "positive")),
    "mrpc": GlueSubset(
        columns=("sentence1", "sentence2"), label_names=("not_equivalent", "equivalent")
    ),
    "qnli": GlueSubset(columns=("question", "sentence"), label_names=_ENTAILMENT),
    "qqp": GlueSubset(columns=("question1", "question2"), label_names=_DUPLICATE),
    "rte": GlueSubset(columns=("sentence1", "sentence2"), label_names=_ENTAILMENT),
    "stsb": GlueSubset(columns=("sentence1", "sentence2"), label_names=(), metric="pearson"),
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
    task, tokenizer = request.task, require_tokenizer(request)
    subset, limit = resolve_subset(task), task.max_train_rows
    name = f"glue/{task.subset}"
    read = {"train": _read("train", request, limit)}
    read |= {split: _read(split, request) for split in subset.report}
    parts = request.bad_rows.drop(read, name)
    train, selection = hold_out(parts["train"], seed=request.split_seed)
    scored = [NamedRows(name=f"5 % of {train_name(limit)}", rows=selection)]
    scored += [NamedRows(name=split, rows=parts[split]) for split in subset.report]
    chosen, report, *extra = (
        encode_labelled(request, name, first_rows(split, task.max_eval_rows)) for split in scored
    )
    return TaskData(
        name=name,
        problem=request.problem,
        train=encode_labelled(request, name, NamedRows(name="train", rows=train)),
        selection=chosen,
        report=report,
        extra_report=extra,
        collate=build_text_collator(task, subset.objective, tokenizer),
        score=request.score,
        tokenizer=tokenizer,
        label_names=subset.label_names,
    )


def join_columns(fields: Fields, columns: Sequence[str]) -> str:
    """A row as one string, e.g. "premise: A man sleeps. hypothesis: He is awake.".

    Args:
        fields: of a row that has the columns.
        columns: in the order in which they are joined.

    Raises:
        DataError: a column is no text, or is empty.
    """
    return " ".join(f"{column}: {fields.text(column)}" for column in columns)


def _read(split: str, request: TaskRequest, limit: int | None = None) -> list[LabelledRow]:
    subset = resolve_subset(request.task)
    return read_split(
        request,
        split,
        partial(_parse, subset, request.problem),
        name=f"glue/{request.task.subset}",
        columns=(*subset.columns, "label"),
        limit=limit,
    )


def _parse(subset: GlueSubset, problem: Problem, fields: Fields) -> Iterator[LabelledRow]:
    label = fields.label("label", problem)
    yield LabelledRow(text=join_columns(fields, subset.columns), label=label)
