"""Gradient learning: Algorithm 1 for one batch.

The base model's device runs forward and backward for hidden representations only. Everything an
adapter needs leaves through the taps while the backward pass is still running, and comes back site
by site when the next forward pass reaches the site.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cola.adapters import Adapter
from cola.attendance import Attendance
from cola.block_graphs import BlockGraphs
from cola.interfaces import Adaptation, Measurements, Placement
from cola.interval_loss import IntervalLoss
from cola.kept_rows import StepRows
from cola.merging import Merger
from cola.meters import GRAPHS, BusyTimer, add_held, count_bytes
from cola.offload.fit import Fit
from cola.offload.fleet import Fleet
from cola.roster import Roster
from cola.row_dropping import RowDropping
from cola.sites import SiteName
from cola.taps import Taps
from cola.task_data import Batch
from cola.user_adapters import SiteAdapter, UserAdapters, num_parameters
from cola.user_rows import EVERYONE, UserId, UserRows


class GradientLearner:
    """Trains the fleet's adapters with the base model's hidden gradients."""

    def __init__(
        self,
        base_model: nn.Module,
        *,
        loss: IntervalLoss,
        taps: Taps,
        fleet: Fleet,
        placement: Placement,
        other_placement: Callable[[], Placement],
        evaluates_elsewhere: bool,
        row_dropping: RowDropping,
        graphs: BlockGraphs | None = None,
        staleness: int = 0,
        attendance: Attendance | None = None,
    ) -> None:
        """Takes over the parts.

        Args:
            base_model: frozen, with the taps on it.
            loss: of a batch.
            taps: between the base model and the fleet.
            fleet: owns the adapters.
            placement: of adapters while training.
            other_placement: makes the other one: inside the weights if training has them beside.
            evaluates_elsewhere: evaluation uses the other one unless it is asked otherwise.
            row_dropping: which rows of padding stay behind.
            graphs: replay blocks of the base model.
            staleness: adaptations that the base model lags behind.
            attendance: of users who have adapters of their own.
        """
        self._base_model = base_model
        self._loss = loss
        self._taps = taps
        self._fleet = fleet
        self._placement = placement
        self._make_other = other_placement
        self._other: Placement | None = None
        self._evaluates_elsewhere = evaluates_elsewhere
        self._row_dropping = row_dropping
        self._graphs = graphs
        self._staleness = staleness
        self._attendance = attendance
        self._roster: Roster | None = None if attendance is None else attendance.roster
        self._step = 0
        self._version = 0
        self._settled = (
            0  # the newest version when nothing was under way: no step uses an older one
        )
        self._device = next(base_model.parameters()).device
        self._timer = BusyTimer(self._device)
        set_training_mode(base_model)

    @property
    def num_trainable(self) -> int:
        """Trainable parameters: all adapters together."""
        with self._fleet.drained() as adapters:
            return sum(num_parameters(adapter) for adapter in adapters.values())

    def record(self, batch: Batch, closing: Adaptation | None) -> Tensor:
        """Lines 3 to 9; with `closing`, fits of lines 10 to 16 start as their data arrives."""
        self._step += 1
        batch = self._admit(batch)
        self._loss.add(batch)
        self._fleet.begin_step(self._fit(closing) if closing else None)
        if not len(batch.labels):  # nobody with a row takes part
            return torch.zeros((), device=self._device)
        self.route(batch.rows)
        rows = StepRows(
            users=batch.rows,
            kept=self._row_dropping.begin(batch),
            check=self._row_dropping.check,
        )
        version = max(self._settled, self._version - self._staleness)
        following = closing.number if closing is not None and not self._staleness else None
        with (
            self._replaying(batch),
            self._timer.measure(),
            self._taps.recording(version, rows, following) as backward,
        ):
            # Logits are not named: of a language model they are too large to outlive their use.
            weighted, loss = self._loss(self._base_model(**batch.inputs).logits, batch)
            backward()
            self._fleet.begin_backward()
            weighted.backward()  # type: ignore[no-untyped-call]
        self._row_dropping.settle()
        self.route(None)
        return loss

    def update(self, adaptation: Adaptation) -> None:
        """Starts the fits that had to wait for the whole backward pass; does not wait for any."""
        self._fleet.finish()
        self._loss.reset()
        self._version = adaptation.number

    @contextmanager
    def evaluating(self, merged: bool | None = None) -> Iterator[nn.Module]:
        """The adapted model with the newest parameters, merged or not as asked or configured."""
        elsewhere = self._evaluates_elsewhere
        if merged is not None:
            elsewhere = merged is not isinstance(self._placement, Merger)
        with self._fleet.drained() as adapters:
            self._settle_users()
            self._settled = self._version
            self._taps.install_all(self._version)
            self._base_model.eval()
            try:
                if not elsewhere:
                    yield self._base_model
                    return
                other = self._other = self._other or self._make_other()
                with self._taps.placed(other, self._version):
                    other.install_all(other.publish_all(adapters))
                    yield self._base_model
            finally:
                self.route(None)
                set_training_mode(self._base_model)

    def route(self, rows: UserRows | None) -> None:
        """Says whose rows the next forward passes in evaluation have."""
        if self._roster is not None:
            self._roster.rows = rows

    def present_users(self) -> frozenset[int] | None:
        """Positions of the users that take part now."""
        return None if self._roster is None else self._roster.present

    def export(self, user: UserId = EVERYONE) -> Mapping[SiteName, Adapter]:
        """A user's adapters, or those that all share, with nothing under way."""
        with self._fleet.drained() as adapters:
            return {site: _of_user(adapter, user) for site, adapter in adapters.items()}

    def state_dict(self) -> dict[str, Any]:
        """Adapters, optimizers, gradients of an interval in progress, users, and the version."""
        with self._fleet.drained():
            self._settle_users()
            self._settled = self._version
            return {
                "fleet": self._fleet.state_dict(),
                "interval": self._loss.state_dict(),
                "users": {} if self._attendance is None else self._attendance.state_dict(),
                "row_dropping": self._row_dropping.state_dict(),
                "step": self._step,
                "version": self._version,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`; the next forward pass installs what was loaded."""
        self._step, self._version = state["step"], state["version"]
        self._settled = self._version
        self._row_dropping.load_state_dict(state["row_dropping"])
        self._loss.load_state_dict(state["interval"])
        if self._attendance is not None:
            self._attendance.load_state_dict(state["users"], self._step)
        self._fleet.load_state_dict(state["fleet"], self._version)
        self._taps.forget()

    def measure(self) -> Measurements:
        """Costs so far."""
        held = self._fleet.held_bytes()
        tensors = [*self._base_model.parameters(), *self._base_model.buffers()]
        add_held(held, self._device, "base_model", count_bytes(tensors))
        if self._graphs is not None:
            add_held(held, self._device, GRAPHS, self._graphs.held_bytes)
        extra = {}
        if isinstance(self._placement, Merger):
            for home, owners in self._placement.held_bytes.items():
                for owner, num in owners.items():
                    add_held(held, home, owner, num)
        lost = self._placement.lost_share if isinstance(self._placement, Merger) else {}
        if lost:
            shares = torch.stack([share.cpu() for share in lost.values()])
            extra["merge/lost_share"] = float(shares.mean())
        stall, returned = self._taps.stall_seconds, self._taps.installed_bytes
        return Measurements(
            base_seconds=self._timer.read() - stall,
            stall_seconds=stall + self._fleet.waited_seconds(),
            offload_seconds=self._fleet.busy_seconds(),
            wire_bytes=self._fleet.wire_bytes(returned),
            returned_bytes=returned if self._fleet.overlaps else 0,
            held_bytes=held,
            extra=extra,
        )

    def close(self) -> None:
        """Takes graphs and taps off and ends the workers."""
        if self._graphs is not None:
            self._graphs.remove()
        self._taps.remove()
        self._fleet.stop()

    def _replaying(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext() if self._graphs is None else self._graphs.step(batch.inputs)

    def _fit(self, closing: Adaptation) -> Fit:
        return Fit(
            number=closing.number,
            learning_rate=closing.learning_rate,
            gradient_scale=self._loss.scale(),
            user_scales=self._loss.user_scales(),
        )

    def _admit(self, batch: Batch) -> Batch:
        """The batch without users that take no part; who comes or goes does so here."""
        if self._attendance is None:
            return batch
        if self._attendance.is_due(self._step):
            with self._fleet.drained():
                self._change_users(begins=True)
        return batch.without(self._attendance.roster.absent)

    def _settle_users(self) -> None:
        """Users that had to stop, or are late, take no part in what follows either."""
        if self._attendance is not None and self._attendance.has_news:
            self._change_users(begins=False)

    def _change_users(self, *, begins: bool) -> None:
        assert self._attendance is not None
        self._attendance.change(self._step, begins=begins)
        self._settled = self._version
        self._fleet.republish(self._version)
        self._taps.forget()


def _of_user(adapter: SiteAdapter, user: UserId) -> Adapter:
    if isinstance(adapter, UserAdapters):
        return adapter.member(adapter.roster.position(user))
    return adapter


def set_training_mode(base_model: nn.Module) -> None:
    """Dropout on, but the statistics of a frozen base's BatchNorm must not move."""
    base_model.train()
    for module in base_model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
