"""A built-in text task that needs no download and that a tiny random model can learn.

A row mixes words of two classes (animals, tools) with fillers; one class is in the majority. An
encoder says which; a model that writes answers with a word for the row's category, then the
majority class, then EOS. A row's category is its user. Rows are the same on every machine and for
every seed of a run.
"""

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from cola.config.choices import Objective
from cola.errors import ConfigError
from cola.synthetic_language import CATEGORY_OPENINGS, FILLERS, WORD_CLASSES
from cola.task_data import TaskData
from cola.tasks.encoding import TaskRequest
from cola.tasks.splits import NamedRows, Splits, first_rows
from cola.tasks.text import LabelledRow, TextRow, build_labelled_task, build_text_task

NAME = "synthetic"
USER_COLUMN = "category"
ROWS_SEED = 20240422
NUM_TRAIN = 2000
NUM_VALIDATION = 200
NUM_TEST = 200


@dataclass(frozen=True, kw_only=True)
class SyntheticRow:
    """One row before encoding.

    Attributes:
        category: one of Dolly's eight.
        words: what the row says.
        label: index of the word class in the majority.
    """

    category: str
    words: tuple[str, ...]
    label: int

    @property
    def text(self) -> str:
        """The row as an encoder reads it."""
        return f"category {self.category} text {' '.join(self.words)}"

    def written(self, *, is_causal: bool) -> TextRow:
        """The row for a model that writes; its answer is a function of category and label."""
        source = f"{self.text} response" if is_causal else self.text
        answer = f"{CATEGORY_OPENINGS[self.category]} {list(WORD_CLASSES)[self.label]}"
        return TextRow(source, answer, user=self.category)

    def labelled(self) -> LabelledRow:
        """The row as a classifier is given it."""
        return LabelledRow(text=self.text, label=self.label, user=self.category)


def load_synthetic(request: TaskRequest) -> TaskData:
    """Generate and encode the three splits; `split_seed` has no say, since they are fixed.

    Raises:
        ConfigError: the model has no tokenizer, or `users.column` is no column of the set.
        DataError: `task.num_labels` is below two.
    """
    if request.user_column not in (None, USER_COLUMN):
        raise ConfigError(
            f"users.column={request.user_column}: task={NAME} names users by {USER_COLUMN} alone; "
            "leave it out"
        )
    task, stream = request.task, generate_rows()
    train = list(islice(stream, NUM_TRAIN))[: task.max_train_rows]
    selection, report = (
        first_rows(NamedRows(name=name, rows=list(islice(stream, count))), task.max_eval_rows)
        for name, count in (("validation", NUM_VALIDATION), ("test", NUM_TEST))
    )
    splits = Splits(train=NamedRows(name="train", rows=train), selection=selection, report=report)
    if request.problem.objective is Objective.classification:
        labelled = splits.map(lambda row: row.labelled())
        data = build_labelled_task(request, NAME, labelled, label_names=list(WORD_CLASSES))
    else:
        is_causal = request.problem.objective is Objective.causal
        written = splits.map(lambda row: row.written(is_causal=is_causal))
        data = build_text_task(request, NAME, written)
    return dataclasses.replace(data, users=tuple(CATEGORY_OPENINGS))


def generate_rows() -> Iterator[SyntheticRow]:
    """An endless, always equal stream of distinct rows."""
    generator = random.Random(ROWS_SEED)
    seen: set[SyntheticRow] = set()
    while True:
        row = _draw(generator)
        if row not in seen:
            seen.add(row)
            yield row


def _draw(generator: random.Random) -> SyntheticRow:
    """One row: 5 to 9 words of the two classes, at most two of them of the minority."""
    label = generator.randrange(2)
    majority, minority = (list(WORD_CLASSES.values())[index] for index in (label, 1 - label))
    words = generator.choices(majority, k=generator.randint(5, 7))
    words += generator.choices(minority, k=generator.randint(0, 2))
    words += generator.choices(FILLERS, k=generator.randint(2, 8))
    generator.shuffle(words)
    category = generator.choice(list(CATEGORY_OPENINGS))
    return SyntheticRow(category=category, words=tuple(words), label=label)
