"""What the parts of a run hand to one another, and the protocols they meet through.

Modules of one layer never import each other: a learner knows `AdaptationSink`, not the fleet that
implements it; the trainer knows `Learner`, not which one.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cola.adaptation_data import Parcel
from cola.adapters import Adapter
from cola.config.choices import Objective
from cola.config.user_settings import UserSettings
from cola.kept_rows import KeptRows
from cola.runtime import upload
from cola.sites import RowStream, SiteName
from cola.user_adapters import SiteAdapter
from cola.user_rows import EVERYONE, UserId, UserRows

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


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """One round of fitting: Algorithm 1, line 12, reached.

    Attributes:
        number: 1 for the first adaptation of the run; also the version of its parameters.
        learning_rate: gamma_t.
    """

    number: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Costs of a learner since it was built, and what it holds now.

    Attributes:
        base_seconds: busy time of the base device in forward and backward.
        stall_seconds: time the base device's host waited for parameters.
        offload_seconds: busy time of fits, summed over workers.
        wire_bytes: adaptation data out and parameters back, across the offload boundary.
        returned_bytes: parameters back, of these.
        held_bytes: bytes by device and owner, for example {"cpu": {"adapters": 4096}}.
    """

    base_seconds: float = 0.0
    stall_seconds: float = 0.0
    offload_seconds: float = 0.0
    wire_bytes: int = 0
    returned_bytes: int = 0
    held_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)


class AdaptationSink(Protocol):
    """Takes adaptation data off the base device. Algorithm 1, lines 9 to 11."""

    def takes_early(self, site: SiteName) -> bool:
        """Whether a hidden input leaves when the site runs, so that the base device forgets it."""

    def send_input(
        self, site: SiteName, hidden_input: Tensor, dtype: torch.dtype, kept: KeptRows | None
    ) -> Parcel:
        """Sends a hidden input, (..., D), ahead of its gradient; must not synchronise.

        Args:
            site: that ran on it.
            hidden_input: as the site got it; not changed in place before the backward pass.
            dtype: that the site computed in: under autocast x may be wider than the product made
                of it, and what was multiplied is x rounded.
            kept: rows that travel; None: all.
        """

    def put(
        self,
        site: SiteName,
        hidden_input: Parcel,
        hidden_gradient: Tensor,
        kept: KeptRows | None,
        rows: UserRows | None,
    ) -> None:
        """Hands over one gradient-carrying call of a site; must not synchronise the base device.

        Args:
            site: that was differentiated.
            hidden_input: what `send_input` gave.
            hidden_gradient: (..., H).
            kept: rows that travel; None: all.
            rows: whose those are, where users have adapters of their own.
        """

    def close(self, site: SiteName) -> None:
        """Every gradient-carrying call of the site has returned: its fit may start."""


class ParameterSource(Protocol):
    """Gives adapters back. Algorithm 1, line 15."""

    def is_ready(self, site: SiteName, version: int) -> bool:
        """Whether `wait` would return at once."""

    def wait(self, site: SiteName, version: int) -> Mapping[str, Tensor]:
        """What the placement published for the site after that adaptation; blocks until then."""


class Placement(Protocol):
    """Where adapters act: beside the sites of the base model, or inside their weights."""

    def publish(self, adapter: SiteAdapter) -> Mapping[str, Tensor]:
        """What the base device needs of fitted adapters; runs where they are fitted."""

    def publish_all(
        self, adapters: Mapping[SiteName, SiteAdapter]
    ) -> dict[SiteName, Mapping[str, Tensor]]:
        """The same for several sites."""

    def install(self, site: SiteName, published: Mapping[str, Tensor]) -> None:
        """Puts what was published into effect; runs on the base device."""

    def install_all(self, published: Mapping[SiteName, Mapping[str, Tensor]]) -> None:
        """The same for several sites."""

    def adapt(self, site: SiteName, hidden_input: Tensor, hidden: Tensor) -> Tensor:
        """The adapted hidden representation, shape of `hidden`."""

    def remove(self) -> None:
        """Leaves the base model exactly, bit for bit, as it was found."""


class Learner(Protocol):
    """What the trainer drives: gradient learning or plain back-propagation."""

    @property
    def num_trainable(self) -> int:
        """Trainable parameters."""

    def record(self, batch: Batch, closing: Adaptation | None) -> Tensor:
        """One forward and backward pass; returns the detached mean loss, a scalar.

        `closing` is the adaptation that this batch completes, None inside an interval.
        """

    def update(self, adaptation: Adaptation) -> None:
        """Completes an adaptation; may return before it has finished everywhere."""

    def evaluating(self, merged: bool | None = None) -> AbstractContextManager[nn.Module]:
        """The adapted model in evaluation mode; drains every fit first.

        `merged` places the adapters inside the weights or beside them; None: as configured.
        """

    def route(self, rows: UserRows | None) -> None:
        """Says whose rows the next forward passes in evaluation have."""

    def present_users(self) -> frozenset[int] | None:
        """Positions of the users that take part now; None where users have no adapters."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes: nested dictionaries of tensors and JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`."""

    def measure(self) -> Measurements:
        """Costs so far; synchronises, so it is called at logged steps only."""

    def export(self, user: UserId = EVERYONE) -> Mapping[SiteName, Adapter]:
        """A user's trained adapters by site, drained; empty where the method has none."""

    def close(self) -> None:
        """Releases workers and hooks; the base model is as it was found."""
