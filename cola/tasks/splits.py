"""Which rows are learned from, which choose the best evaluation, and which are reported on.

One rule for every text set but GLUE: a labelled `test` is reported on and `validation` selects;
where one of the two is absent, the other is reported on and a hold-out of train selects. Hold-outs
depend on the split seed alone, so that training seeds share a split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from cola.errors import DataError

T = TypeVar("T")
S = TypeVar("S")

SELECTION_FRACTION = 0.05
REPORT_FRACTION = 0.1  # of sets that come as one split


@dataclass(frozen=True, kw_only=True)
class NamedRows(Generic[T]):
    """Rows and where they came from (`train`, `5 % of train`, `first 200 of test` ...)."""

    name: str
    rows: Sequence[T]


@dataclass(frozen=True, kw_only=True)
class Splits(Generic[T]):
    """Rows of a set before they are encoded.

    Attributes:
        train: rows to learn from.
        selection: rows that choose the best evaluation.
        report: rows to report on.
    """

    train: NamedRows[T]
    selection: NamedRows[T]
    report: NamedRows[T]

    def map(self, change: Callable[[T], S]) -> "Splits[S]":
        """The same splits with every row changed."""
        train, selection, report = (
            NamedRows(name=split.name, rows=[change(row) for row in split.rows])
            for split in (self.train, self.selection, self.report)
        )
        return Splits(train=train, selection=selection, report=report)


def choose_splits(
    parts: Mapping[str, Sequence[T]],
    *,
    name: str,
    seed: int,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
) -> Splits[T]:
    """Apply the rule to the splits that a set comes with.

    Args:
        parts: rows by split; `train`, and `validation` or `test` where the set has them.
        name: the set, for messages.
        seed: of hold-outs, never of the training.
        max_train_rows: first rows of train to keep. What is reported on is held out before, so
            that it does not depend on how much is learned from.
        max_eval_rows: first rows to keep of both scored splits.

    Raises:
        DataError: no train split, a split without rows, or too few rows to hold any out.
    """
    if "train" not in parts:
        raise DataError(
            f"{name} has no train split, only {', '.join(parts) or 'none at all'}; add it "
            "(train.jsonl or train.jsonl.gz), or leave out data_dir to read the hub"
        )
    for split, rows in parts.items():
        if not rows:
            raise DataError(
                f"{name}: split {split} is empty; give it at least one row, or remove it"
            )
    train, source = parts["train"], "train"
    scored = [NamedRows(name=split, rows=parts[split]) for split in _SCORED if split in parts]
    if not scored:
        train, held = hold_out(train, fraction=REPORT_FRACTION, seed=seed)
        scored = [NamedRows(name="10 % of train", rows=held)]
        source = "the other 90 % of train"
    train = train[:max_train_rows]
    if len(scored) == 1:
        train, held = hold_out(train, seed=seed)
        limited = train_name(max_train_rows, source)
        scored = [NamedRows(name=f"5 % of {limited}", rows=held), *scored]
    selection, report = (first_rows(split, max_eval_rows) for split in scored)
    return Splits(train=NamedRows(name="train", rows=train), selection=selection, report=report)


_SCORED = ("validation", "test")
"""Official splits in the order (selects, is reported on)."""


def first_rows(split: NamedRows[T], limit: int | None) -> NamedRows[T]:
    """The first rows of a split; its name says so if rows were left out."""
    if limit is None or len(split.rows) <= limit:
        return split
    return NamedRows(name=f"first {limit} of {split.name}", rows=split.rows[:limit])


def hold_out(
    rows: Sequence[T], *, fraction: float = SELECTION_FRACTION, seed: int
) -> tuple[list[T], list[T]]:
    """Split rows at random into (kept, held out); both keep the order of `rows`.

    Args:
        rows: at least two.
        fraction: share held out; rounded, at least one row on either side.
        seed: of the split, never of the training.

    Raises:
        DataError: fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(
            f"{len(rows)} rows cannot be divided into training and selection rows; "
            "raise task.max_train_rows or give a larger train split"
        )
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held = set(order[:count].tolist())
    kept = [row for index, row in enumerate(rows) if index not in held]
    return kept, [rows[index] for index in sorted(held)]


def train_name(max_train_rows: int | None, source: str = "train") -> str:
    """What a hold-out was taken from, for the name of its split."""
    return source if max_train_rows is None else f"the first {max_train_rows} rows of {source}"
