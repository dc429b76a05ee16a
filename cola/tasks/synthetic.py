"""A built-in text task that needs no download and that a tiny random model can learn.

A row mixes words of two classes (animals, tools) with fillers; one class is in the majority. An
encoder says which; a causal model answers with a word for the row's category, then the majority
class, then EOS. Rows are the same on every machine and for every seed of a run.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cola.config.choices import Objective
from cola.interfaces import Split, TaskData
from cola.synthetic_language import CATEGORY_OPENINGS, FILLERS, WORD_CLASSES
from cola.tasks.collate import build_text_collator
from cola.tasks.encoding import (
    TaskRequest,
    check_labels,
    encode_responses,
    encode_texts,
    require_tokenizer,
)

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

    @property
    def prompt(self) -> str:
        """The row as a causal model reads it."""
        return f"{self.text} response"

    @property
    def response(self) -> str:
        """What a causal model has to answer, a function of category and label."""
        return f"{CATEGORY_OPENINGS[self.category]} {list(WORD_CLASSES)[self.label]}"


def load_synthetic(request: TaskRequest) -> TaskData:
    """Generate and encode the three splits; `split_seed` has no say, since they are fixed.

    Raises:
        ConfigError: the model has no tokenizer.
        DataError: `task.num_labels` is below two.
    """
    rows = generate_rows()
    train = list(islice(rows, NUM_TRAIN))[: request.task.max_train_rows]
    return TaskData(
        name="synthetic",
        problem=request.problem,
        train=_encode("train", train, request),
        selection=_encode("validation", list(islice(rows, NUM_VALIDATION)), request),
        report=_encode("test", list(islice(rows, NUM_TEST)), request),
        collate=build_text_collator(
            request.task, request.problem.objective, require_tokenizer(request)
        ),
        score=request.score,
    )


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


def _encode(name: str, rows: Sequence[SyntheticRow], request: TaskRequest) -> Split:
    """Tokens of a split, each row with its category."""
    tokenizer = require_tokenizer(request)
    max_length = request.problem.max_length
    encoded: list[dict[str, Any]]
    if request.problem.objective is Objective.causal:
        encoded = encode_responses(
            [row.prompt for row in rows],
            [row.response for row in rows],
            tokenizer=tokenizer,
            max_length=max_length,
        )
    else:
        encoded = encode_texts(
            [row.text for row in rows],
            [row.label for row in rows],
            tokenizer=tokenizer,
            max_length=max_length,
        )
        check_labels(encoded, request.problem, f"synthetic ({name})")
    for row, source in zip(encoded, rows, strict=True):
        row["category"] = source.category
    return Split(name=name, rows=encoded)
