"""What the parts of a run hand to one another, and the protocols they meet through.

Modules of one layer never import each other: a learner knows `AdaptationSink`, not the fleet that
implements it; the trainer knows `Learner`, not which one.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from cola.adaptation_data import Parcel
from cola.adapters import Adapter
from cola.kept_rows import KeptRows
from cola.site_calls import SiteRun
from cola.sites import SiteName
from cola.task_data import Batch
from cola.user_adapters import SiteAdapter
from cola.user_rows import EVERYONE, UserId, UserRows


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

    def send_inputs(self, runs: Sequence[SiteRun]) -> list[Parcel]:
        """Sends hidden inputs ahead of their gradients; must not synchronise."""

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
            hidden_input: what `send_inputs` gave.
            hidden_gradient: (..., H).
            kept: rows that travel; None: all.
            rows: whose those are, where users have adapters of their own.
        """

    def close(self, site: SiteName) -> None:
        """Every gradient-carrying call of the site has returned: its fit may start."""


class ParameterSource(Protocol):
    """Gives adapters back. Algorithm 1, line 15."""

    def ready(self, sites: Iterable[SiteName], version: int) -> list[SiteName]:
        """Those that `wait` would return at once."""

    def wait(self, sites: Iterable[SiteName], version: int) -> dict[SiteName, Mapping[str, Tensor]]:
        """What the placement published for sites after that adaptation; blocks until then."""


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
