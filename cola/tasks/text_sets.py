"""The paper's text sets whose answer is written: Table 3's six, and Dolly.

Each set says in one function how a row of the hub's columns becomes what a model is given and what
it has to write. A causal model's prompt ends with "response: ". WebNLG and DART have several texts
per row; each one is a row here, in training and in scoring, compared with itself alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cola.config.choices import Objective
from cola.errors import DataError
from cola.synthetic_language import CATEGORY_OPENINGS
from cola.task_data import TaskData
from cola.tasks.encoding import TaskRequest
from cola.tasks.fields import Fields
from cola.tasks.reading import read_split
from cola.tasks.sources import list_splits
from cola.tasks.splits import choose_splits
from cola.tasks.text import TextRow, build_text_task
from cola.user_rows import UserId

SENTIMENTS = ("negative", "neutral", "positive")
"""Words for the classes of Financial PhraseBank, in the order of its labels."""


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """Static facts of a set.

    Attributes:
        columns: of the hub's data set, as far as they are read.
        parse: texts of one row; none where the set gives no text to write.
        objective: the form in which the paper uses it.
        user_column: names a row's user, where the set has such a column.
        users: all of them in the paper's order, where it has one.
    """

    columns: tuple[str, ...]
    parse: Callable[[Fields], Iterator[TextRow]]
    objective: Objective = Objective.seq2seq
    user_column: str | None = None
    users: tuple[UserId, ...] = ()

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the set can be posed as, its natural form first."""
        other = {Objective.seq2seq: Objective.causal, Objective.causal: Objective.seq2seq}
        return self.objective, other[self.objective]


def load_text_set(request: TaskRequest) -> TaskData:
    """Read, split and encode one of `TEXT_SETS`.

    Raises:
        ConfigError: the model has no tokenizer, or does not fit.
        DataError: a split is missing, empty or cannot be read, or a row cannot be used.
    """
    task, text_set = request.task, TEXT_SETS[request.task.name]
    parts = {
        split: _read(request, split)
        for split in list_splits(task, request.data_dir)
        if split in ("train", "validation", "test")
    }
    splits = choose_splits(
        request.bad_rows.drop(parts, task.name),
        name=task.name,
        seed=request.split_seed,
        max_train_rows=task.max_train_rows,
        max_eval_rows=task.max_eval_rows,
    )
    data = build_text_task(request, task.name, splits)
    # Another column may name users of the same names, and in no order of the paper's.
    is_own = request.user_column in (None, text_set.user_column)
    return replace(data, users=text_set.users if is_own else ())


def _read(request: TaskRequest, split: str) -> list[TextRow]:
    """Every text of a split."""
    name, text_set = request.task.name, TEXT_SETS[request.task.name]
    rows = read_split(
        request,
        split,
        text_set.parse,
        name=name,
        columns=text_set.columns,
        own_user=text_set.user_column,
    )
    ending = " response: " if request.problem.objective is Objective.causal else ""
    return [replace(text, source=text.source + ending) for text in rows]


def _fpb(fields: Fields) -> Iterator[TextRow]:
    yield TextRow(fields.text("sentence"), fields.word("label", SENTIMENTS))


def _wikisql(fields: Fields) -> Iterator[TextRow]:
    header = ", ".join(fields.texts("table", "header"))
    yield TextRow(
        f"question: {fields.text('question')} table: {header}", fields.text("sql", "human_readable")
    )


def _samsum(fields: Fields) -> Iterator[TextRow]:
    # One dialogue of the set is empty.
    yield TextRow(fields.optional_text("dialogue"), fields.text("summary"))


def _e2e_nlg(fields: Fields) -> Iterator[TextRow]:
    yield TextRow(fields.text("meaning_representation"), fields.text("human_reference"))


def _web_nlg(fields: Fields) -> Iterator[TextRow]:
    category = fields.text("category")
    triple_sets = fields.text_lists("modified_triple_sets", "mtriple_set")
    triples = " ; ".join(" - ".join(triples) for triples in triple_sets)
    # Entries of the test split that were not part of the challenge have no text.
    for text in fields.full_texts("lex", "text"):
        yield TextRow(f"category: {category}, mtriple_set: {triples}", text)


def _dart(fields: Fields) -> Iterator[TextRow]:
    triples = " ; ".join(" - ".join(triple) for triple in fields.text_lists("tripleset"))
    sources = fields.texts("annotations", "source")
    texts = fields.full_texts("annotations", "text")
    if len(sources) != len(texts):
        raise DataError(
            f"{fields.place}: annotations has {len(sources)} sources for {len(texts)} texts; "
            "every text needs one"
        )
    for source, text in zip(sources, texts, strict=True):
        yield TextRow(f"source: {source}, tripleset: {triples}", text)


def _dolly(fields: Fields) -> Iterator[TextRow]:
    instruction, context = fields.text("instruction"), fields.optional_text("context")
    yield TextRow(f"instruction: {instruction} context: {context}", fields.text("response"))


TEXT_SETS: dict[str, TextSet] = {
    "dart": TextSet(columns=("tripleset", "annotations"), parse=_dart),
    "dolly": TextSet(
        columns=("instruction", "context", "response", "category"),
        parse=_dolly,
        objective=Objective.causal,
        user_column="category",
        users=tuple(CATEGORY_OPENINGS),
    ),
    "e2e_nlg": TextSet(columns=("meaning_representation", "human_reference"), parse=_e2e_nlg),
    "fpb": TextSet(columns=("sentence", "label"), parse=_fpb),
    "samsum": TextSet(columns=("dialogue", "summary"), parse=_samsum),
    "web_nlg": TextSet(
        columns=("category", "modified_triple_sets", "lex"),
        parse=_web_nlg,
        user_column="category",
    ),
    "wikisql": TextSet(columns=("question", "table", "sql"), parse=_wikisql),
}
