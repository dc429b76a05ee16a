"""Taps: hooks on the sites of the base model. Algorithm 1, lines 3 to 7 and 15.

Before a site runs in a new step, its tap installs the parameters of the last adaptation; after it
ran, the tap adds the adapter's output and sends the hidden input away, or remembers it; when the
gradient of the adapted hidden representation arrives, it follows.

Two moments are easy to get wrong. The gradient of a site is known before that site's own product
with its weight: nothing may be installed until the whole backward pass is over. And non-reentrant
gradient checkpointing runs forward hooks a second time, inside the backward pass: such a recompute
neither installs nor counts nor sends.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola.adaptation_data import Parcel
from cola.errors import SiteError
from cola.installer import Installer
from cola.interfaces import AdaptationSink, ParameterSource, Placement
from cola.kept_rows import KeptRows
from cola.sites import SiteName, SiteSpec
from cola.user_rows import UserRows

Report = Callable[..., None]


def _look_away(site: SiteName, shape: torch.Size, hidden_gradient: Tensor) -> None:
    """Nothing is asked of this step's gradients."""


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """Rows of one training step.

    Attributes:
        users: whose they are, where users have adapters of their own.
        kept: which of them travel, by site; all where a site is missing.
        check: sees every hidden gradient, and the shape of the hidden input that belongs to it.
    """

    users: UserRows | None = None
    kept: Mapping[SiteName, KeptRows] = field(default_factory=dict)
    check: Callable[[SiteName, torch.Size, Tensor], None] = _look_away


class _Phase(Enum):
    idle = "idle"  # evaluation, or between steps: adapt, record nothing
    forward = "forward"
    backward = "backward"  # forward hooks that fire now are recomputes


class _TapGradient(torch.autograd.Function):
    """Identity whose backward reports the gradient, and the hidden input if it was kept for that.

    x is saved through autograd, not held by a closure, so that gradient checkpointing can drop it
    and recompute it, and changing it in place is noticed. `anchor` is a scalar that requires a
    gradient: it makes the output part of the graph where the base model, being frozen, has none
    yet; it never receives one.
    """

    @staticmethod
    def forward(
        ctx: Any, adapted_hidden: Tensor, kept: Tensor | None, anchor: Tensor, report: Report
    ) -> Tensor:
        if kept is not None:
            ctx.save_for_backward(kept)
        ctx.report = report
        if not adapted_hidden._is_view():
            # Returned as it is, without a copy, and still open to in-place operations downstream.
            ctx.mark_dirty(adapted_hidden)
        return adapted_hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (hidden_gradient,) = gradients
        ctx.report(hidden_gradient, *ctx.saved_tensors)
        return hidden_gradient, None, None, None


def _not_differentiated(*gradients: Tensor) -> None:
    raise AssertionError("the graph of a recompute was differentiated")


def _same_tensor(tensor: Tensor) -> Tensor:
    """The tensor that this one is a mere reshape of, rows kept; else itself."""
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or base.shape[-1:] != tensor.shape[-1:]:
        return tensor
    return base if base.is_contiguous() and tensor.is_contiguous() else tensor


class _Unchanged:
    """Remembers the version of a tensor without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._alias = tensor.detach()  # shares the count of in-place changes, and, until the
        self._alias.data = tensor.new_empty(0)  # next line, the memory
        self._version = self._alias._version

    @property
    def holds(self) -> bool:
        """Whether nothing was written to the tensor since."""
        return self._alias._version == self._version


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One run of a site in a recorded forward pass.

    Attributes:
        site: which.
        shape: of the hidden input.
        kept: its rows that travel; None: all.
        sent: the hidden input, if it has left.
        unchanged: watches over it then.
    """

    site: SiteName
    shape: torch.Size
    kept: KeptRows | None
    sent: Parcel | None = None
    unchanged: _Unchanged | None = None


class Taps:
    """Hooks on every site of a base model."""

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
        device = next(base_model.parameters()).device
        self._anchor = torch.zeros((), device=device, requires_grad=True)
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
    def recording(self, version: int, rows: StepRows | None = None) -> Iterator[Callable[[], None]]:
        """One training step, with the parameters of adaptation `version`.

        Yields a function to call between the forward and the backward pass.

        Raises:
            SiteError: a site did not run in the first recorded step.
        """
        self._rows = rows or StepRows()
        self._num_open = dict.fromkeys(self._sites, 0)
        self._installer.begin(version)
        self._phase = _Phase.forward
        try:
            yield self._begin_backward
        finally:
            self._phase = _Phase.idle

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
        if self._phase is _Phase.forward:
            self._installer.require(site)

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
        if self._phase is _Phase.idle:
            return adapted_hidden
        leaves = self._sink.takes_early(site)
        report: Report = _not_differentiated  # a recompute's own graph is thrown away
        if self._phase is _Phase.forward:
            self._require_graph(site)
            self._num_open[site] += 1
            report = partial(self._report, self._begin_call(site, hidden_input, hidden, leaves))
        # A view is tapped at its base (Conv1D returns one): it stays open to in-place operations.
        whole = _same_tensor(adapted_hidden)
        tapped: Tensor = _TapGradient.apply(  # type: ignore[no-untyped-call]
            whole, None if leaves else hidden_input.detach(), self._anchor, report
        )
        return tapped if whole is adapted_hidden else tapped.view(adapted_hidden.shape)

    def _begin_call(
        self, site: SiteName, hidden_input: Tensor, hidden: Tensor, leaves: bool
    ) -> _Call:
        kept = self._rows.kept.get(site)
        if kept is not None and not kept.applies_to(hidden_input.shape):
            kept = None
        sent, unchanged = None, None
        if leaves:
            sent = self._sink.send_input(site, hidden_input, hidden.dtype, kept)
            unchanged = _Unchanged(hidden_input)
        return _Call(site=site, shape=hidden_input.shape, kept=kept, sent=sent, unchanged=unchanged)

    def _require_graph(self, site: SiteName) -> None:
        if not torch.is_grad_enabled():
            raise SiteError(
                f"site {site!r} ran with gradients disabled inside a training step, as reentrant "
                "gradient checkpointing does; on a frozen base model that loses every hidden "
                "gradient: use non-reentrant checkpointing (model.gradient_checkpointing=true)"
            )

    def _report(
        self, call: _Call, hidden_gradient: Tensor, hidden_input: Tensor | None = None
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
            sent = self._sink.send_input(site, hidden_input, hidden_gradient.dtype, call.kept)
        users = self._rows.users if call.kept is None else call.kept.rows
        self._sink.put(site, sent, hidden_gradient, call.kept, users)
        self._num_open[site] -= 1
        if self._num_open[site] == 0:
            self._sink.close(site)
