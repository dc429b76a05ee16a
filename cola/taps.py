"""Taps: hooks on the sites of the base model. Algorithm 1, lines 3 to 7 and 15.

Before a site runs in a new step, its tap installs the parameters of the last adaptation; after it
ran, the tap adds the adapter's output and sends the hidden input away, or remembers it; when the
gradient of the adapted hidden representation arrives, it follows.

Two moments are easy to get wrong. The gradient of a site is known before that site's own product
with its weight: nothing may be installed until the whole backward pass is over. And non-reentrant
gradient checkpointing runs forward hooks a second time, inside the backward pass: such a recompute
neither installs nor counts nor sends.

A captured graph runs no hooks (`cola.block_graphs`): what the taps noted on the tape while it was
captured is replayed by `require`, `fetch_ahead`, `ran` and `arrived`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola.errors import SiteError
from cola.installer import Installer
from cola.interfaces import AdaptationSink, ParameterSource, Placement
from cola.kept_rows import KeptRows, StepRows
from cola.site_calls import (
    Report,
    SiteCall,
    SiteRun,
    Tape,
    Taped,
    TapGradient,
    Unchanged,
    not_differentiated,
    same_tensor,
)
from cola.sites import SiteName, SiteSpec


class _Phase(Enum):
    idle = "idle"  # evaluation, or between steps: adapt, record nothing
    forward = "forward"
    backward = "backward"  # forward hooks that fire now are recomputes


class Taps:
    """Hooks on every site of a base model.

    Attributes:
        anchor: a scalar that every tapped output hangs on in the graph; gets no gradient.
    """

    def __init__(
        self,
        base_model: nn.Module,
        sites: Mapping[SiteName, SiteSpec],
        *,
        placement: Placement,
        sink: AdaptationSink,
        source: ParameterSource,
    ) -> None:
        """Attaches the hooks; the base model must be frozen."""
        self._sites = dict(sites)
        self._sink = sink
        self._phase = _Phase.idle
        self._rows = StepRows()
        self._num_open: dict[SiteName, int] = {}
        self._has_checked_sites = False
        self._tape: Tape | None = None
        device = next(base_model.parameters()).device
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._installer = Installer(self._sites, placement, source, device)
        self._handles = []
        for site in self._sites:
            module = base_model.get_submodule(site)
            before, after = partial(self._before, site), partial(self._after, site)
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    @property
    def stall_seconds(self) -> float:
        """Time spent waiting for parameters so far."""
        return self._installer.stall_seconds

    @property
    def installed_bytes(self) -> int:
        """Parameters that came back so far."""
        return self._installer.installed_bytes

    @contextmanager
    def recording(
        self, version: int, rows: StepRows | None = None, following: int | None = None
    ) -> Iterator[Callable[[], None]]:
        """One training step, with the parameters of adaptation `version`.

        Args:
            version: to install.
            rows: of the batch.
            following: the version that this step's data makes, if the next step has that one.

        Yields a function to call between the forward and the backward pass.

        Raises:
            SiteError: a site did not run in the first recorded step.
        """
        self._rows = rows or StepRows()
        self._num_open = dict.fromkeys(self._sites, 0)
        self._installer.begin(version, following)
        self._phase = _Phase.forward
        try:
            yield self._begin_backward
        finally:
            self._phase = _Phase.idle

    @property
    def sites(self) -> list[SiteName]:
        """All that are tapped."""
        return list(self._sites)

    @property
    def is_recording(self) -> bool:
        """Whether this is the forward pass of a training step."""
        return self._phase is _Phase.forward

    @contextmanager
    def taping(self) -> Iterator[Tape]:
        """Runs of sites are noted, not sent: they are captured, and happen when replayed."""
        self._tape = Tape(anchor=self.anchor.detach().requires_grad_())
        try:
            yield self._tape
        finally:
            self._tape = None

    def takes_early(self, site: SiteName) -> bool:
        """Whether a replayed site's hidden input leaves in the forward pass."""
        return self._sink.takes_early(site)

    def kept_rows(self, site: SiteName, shape: torch.Size) -> KeptRows | None:
        """Rows of a hidden input of this shape that travel in this step; None: all."""
        kept = self._rows.kept.get(site)
        return kept if kept is not None and kept.applies_to(shape) else None

    def require(self, sites: Sequence[SiteName]) -> None:
        """A block with these sites is replayed next: their parameters are in effect from here."""
        self._installer.require(sites)

    def fetch_ahead(self) -> None:
        """A block is being replayed: there is time to fetch parameters of those to come."""
        self._installer.fetch_ahead()

    def ran(self, runs: Sequence[SiteRun], *, leave: bool) -> list[SiteCall]:
        """Sites of a replayed block have run; their hidden inputs leave now, or when it is said."""
        for run in runs:
            self._num_open[run.site] += 1
        sent = self._sink.send_inputs(runs) if leave else [None] * len(runs)
        return [
            SiteCall(site=run.site, shape=run.hidden_input.shape, kept=run.kept, sent=parcel)
            for run, parcel in zip(runs, sent, strict=True)
        ]

    def arrived(
        self, call: SiteCall, hidden_gradient: Tensor, hidden_input: Tensor | None = None
    ) -> None:
        """The gradient of a call has come, with its input if that is still here."""
        site, sent = call.site, call.sent
        if call.unchanged is not None and not call.unchanged.holds:
            raise SiteError(
                f"the hidden input of site {site!r} was changed in place after the site ran, while "
                "it was on its way to the offload device: leave the site out of model.sites, or "
                "use offload=none"
            )
        self._rows.check(site, call.shape, hidden_gradient)
        if sent is None:
            assert hidden_input is not None
            run = SiteRun(site, hidden_input, hidden_gradient.dtype, call.kept)
            (sent,) = self._sink.send_inputs([run])
        users = self._rows.users if call.kept is None else call.kept.rows
        self._sink.put(site, sent, hidden_gradient, call.kept, users)
        self._num_open[site] -= 1
        if self._num_open[site] == 0:
            self._sink.close(site)

    def leave(self, sites: Iterable[SiteName]) -> None:
        """The backward pass has left a replayed block with these sites."""
        self._installer.release(set(sites))

    def install_all(self, version: int) -> None:
        """Brings every site to one version; the source must have drained."""
        self._installer.install_all(version)

    @contextmanager
    def placed(self, placement: Placement, version: int) -> Iterator[None]:
        """Another placement for a while; the caller installs into it."""
        usual = self._installer.placement
        usual.remove()
        self._installer.placement = placement
        try:
            yield
        finally:
            placement.remove()
            self._installer.placement = usual
            self._installer.forget()
            self._installer.install_all(version)

    def forget(self) -> None:
        """Makes the next forward pass install afresh, after parameters were loaded."""
        self._installer.forget()

    def remove(self) -> None:
        """Takes the hooks off and leaves the base model as it was found."""
        for handle in self._handles:
            handle.remove()
        self._installer.forget()
        self._installer.placement.remove()

    def _begin_backward(self) -> None:
        silent = [site for site, num in self._num_open.items() if num == 0]
        if silent and not self._has_checked_sites:
            raise SiteError(
                f"sites {silent[:3]} ({len(silent)} of {len(self._sites)}) did not run in the "
                "forward pass: leave them out of model.sites"
            )
        self._has_checked_sites = True
        self._phase = _Phase.backward

    def _before(self, site: SiteName, module: nn.Module, args: Any) -> None:
        if self._phase is _Phase.forward and self._tape is None:
            self._installer.require([site])

    def _after(
        self,
        site: SiteName,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        hidden: Tensor,
    ) -> Tensor:
        hidden_input = args[0] if args else next(iter(kwargs.values()))
        adapted_hidden = self._installer.placement.adapt(site, hidden_input, hidden)
        if self._phase is _Phase.idle and self._tape is None:
            return adapted_hidden
        leaves = self._tape is not None or self._sink.takes_early(site)
        anchor = self.anchor
        report: Report = not_differentiated  # a recompute's own graph is thrown away
        if self._tape is not None:
            taped = Taped(site=site, dtype=hidden.dtype)
            self._tape.calls.append(taped)
            self._tape.hidden_inputs.append(hidden_input)
            anchor, report = self._tape.anchor, taped.note
        elif self._phase is _Phase.forward:
            self._installer.fetch_ahead()
            self._require_graph(site)
            self._num_open[site] += 1
            report = partial(self.arrived, self._begin_call(site, hidden_input, hidden, leaves))
        # A view is tapped at its base (Conv1D returns one): it stays open to in-place operations.
        whole = same_tensor(adapted_hidden)
        tapped: Tensor = TapGradient.apply(  # type: ignore[no-untyped-call]
            whole, None if leaves else hidden_input.detach(), anchor, report
        )
        return tapped if whole is adapted_hidden else tapped.view(adapted_hidden.shape)

    def _begin_call(
        self, site: SiteName, hidden_input: Tensor, hidden: Tensor, leaves: bool
    ) -> SiteCall:
        shape, sent, unchanged = hidden_input.shape, None, None
        kept = self.kept_rows(site, shape)
        if leaves:
            (sent,) = self._sink.send_inputs([SiteRun(site, hidden_input, hidden.dtype, kept)])
            unchanged = Unchanged(hidden_input)
        return SiteCall(site=site, shape=shape, kept=kept, sent=sent, unchanged=unchanged)

    def _require_graph(self, site: SiteName) -> None:
        if not torch.is_grad_enabled():
            raise SiteError(
                f"site {site!r} ran with gradients disabled inside a training step, as reentrant "
                "gradient checkpointing does; on a frozen base model that loses every hidden "
                "gradient: use non-reentrant checkpointing (model.gradient_checkpointing=true)"
            )
