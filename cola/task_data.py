"""What a task hands to a run: problems, rows, batches and splits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cola.config.choices import Objective
from cola.config.user_settings import UserSettings
from cola.runtime import upload
from cola.sites import RowStream
from cola.user_rows import UserId, UserRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = Mapping[str, Any]
"""One encoded row, still unpadded.

Text: `input_ids` (T,), and `label` for classifiers or `labels` (T,) for models that write. Rows of
scored splits that a model writes an answer to also have `prompt_ids` (what it is given) and
`reference` (the text it should write). `user`, where the data names one, owns the row.
"""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a base model has to be built for; known before any data is read.

    Attributes:
        objective: what the loss scores.
        num_labels: classes; 1 for regression; unused for models that write.
        image_shape: (channels, height, width) for images, else None.
        max_length: tokens of the longest text row.
    """

    objective: Objective
    num_labels: int
    image_shape: tuple[int, int, int] | None
    max_length: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch, padded, on one device.

    Attributes:
        inputs: keyword arguments of the base model's forward, leading axis B.
        labels: (B,) classes or values; (B, T) token ids with -100 where nothing is scored.
        num_terms: scored terms of the loss (rows, or label tokens), the batch's weight in an
            interval.
        rows: whose rows, where users have adapters of their own; rows are grouped by user then.
        row_terms: (B,) scored terms of each row, int64 on the CPU; given where `rows` is.
        row_masks: (B, T) each, true where a token of that text is real, bool on the CPU.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    num_terms: int
    rows: UserRows | None = None
    row_terms: Tensor | None = None
    row_masks: Mapping[RowStream, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            inputs={
                name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()
            },
            labels=self.labels.to(device, non_blocking=True),
            num_terms=self.num_terms,
            rows=self.rows,
            row_terms=self.row_terms,
            row_masks=self.row_masks,
        )

    def without(self, users: frozenset[int]) -> "Batch":
        """The batch without the rows of some users; `rows` and `row_terms` are given."""
        assert self.rows is not None
        assert self.row_terms is not None
        if users.isdisjoint(self.rows.users):
            return self
        indices, rows = self.rows.without(users)
        kept = torch.tensor(indices, dtype=torch.long)
        there = upload(kept, self.labels.device)
        row_terms = self.row_terms[kept]
        return Batch(
            inputs={name: tensor[there] for name, tensor in self.inputs.items()},
            labels=self.labels[there],
            num_terms=int(row_terms.sum()),
            rows=rows,
            row_terms=row_terms,
            row_masks={stream: mask[kept] for stream, mask in self.row_masks.items()},
        )


@runtime_checkable
class TensorRows(Protocol):
    """Rows of a split that lie in whole tensors: a batch is one gather, and they can move."""

    @property
    def device(self) -> torch.device:
        """Where they lie."""

    @property
    def num_bytes(self) -> int:
        """What they hold there."""

    def to(self, device: torch.device) -> Sequence[Example]:
        """The same rows on another device."""

    def fetch(self, indices: Tensor) -> Batch:
        """Rows (B,), given by indices on the rows' device; the same bits as collating them."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Encoded rows and where they came from (`train`, `5 % of train`, `validation` ...).

    Attributes:
        name: of the split.
        rows: N of them.
        owners: (N,) position of each row's user in the task's `users`, int64 on the CPU; None where
            rows have no user.
    """

    name: str
    rows: Sequence[Example]
    owners: Tensor | None = None


Values = Tensor | Sequence[str]
"""Classes or values (N,) on the CPU, or N texts."""


class Score(Protocol):
    """Metric of a task: the first key of the answer is the one a run is judged by."""

    def __call__(self, *, predictions: Values, references: Values) -> dict[str, float]:
        """N of each; higher is better for the first key."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task ready to train on.

    Attributes:
        name: `glue/mrpc`, `digits`, ...
        train, selection, report: rows to learn from, to choose the best evaluation by, and to
            report on. `extra_report` holds further reported splits (MNLI mismatched).
        collate: pads rows into a batch.
        score: the task's metric.
        collate_prompts: pads the `prompt_ids` of rows for generation; None where models classify.
        augment: random changes to training batches, a function of the batch and of a generator on
            the CPU; None where there are none.
        tokenizer: turns tokens back into text; None for images.
        label_names: of the classes, where they have names.
        users: names of the users that own rows, in order; empty without users.
        user_settings: what each of `users` trains, where they have adapters of their own.
        bad_users: who had a row that cannot be read; none of their rows are here.
        groups_users: batches lie user by user and say whose rows they are.
    """

    name: str
    problem: Problem
    train: Split
    selection: Split
    report: Split
    extra_report: Sequence[Split] = ()
    collate: Callable[[Sequence[Example]], Batch]
    score: Score
    collate_prompts: Callable[[Sequence[Example]], dict[str, Tensor]] | None = None
    augment: Callable[[Batch, torch.Generator], Batch] | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    label_names: Sequence[str] = ()
    users: tuple[UserId, ...] = ()
    user_settings: tuple[UserSettings, ...] = ()
    bad_users: tuple[UserId, ...] = ()
    groups_users: bool = False
