"""Taps: hooks on the sites of the base model. Algorithm 1, lines 3 to 7 and 15.

Before a site runs in a new step, its tap installs the parameters of the last adaptation; after it
ran, the tap adds the adapter's output and remembers the hidden input; when the gradient of the
adapted hidden representation arrives, the pair goes into a sink.

Two moments are easy to get wrong. The gradient of a site is known before that site's own product
with its weight: nothing may be installed until the whole backward pass is over. And non-reentrant
gradient checkpointing runs forward hooks a second time, inside the backward pass: such a recompute
neither installs nor counts.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola.adaptation_data import AdaptationData
from cola.errors import SiteError
from cola.interfaces import AdaptationSink, ParameterSource, Placement
from cola.sites import SiteName, SiteSpec, flatten_rows
from cola.user_rows import UserRows

Report = Callable[[Tensor, Tensor], None]


class _Phase(Enum):
    idle = "idle"  # evaluation, or between steps: adapt, record nothing
    forward = "forward"
    backward = "backward"  # forward hooks that fire now are recomputes


class _TapGradient(torch.autograd.Function):
    """Identity whose backward reports (x, gradient).

    x is saved through autograd, not held by a closure, so that gradient checkpointing can drop it
    and recompute it. `anchor` is a scalar that requires a gradient: it makes the output part of
    the graph where the base model, being frozen, has none yet; it never receives one.
    """

    @staticmethod
    def forward(
        ctx: Any, adapted_hidden: Tensor, hidden_input: Tensor, anchor: Tensor, report: Report
    ) -> Tensor:
        ctx.save_for_backward(hidden_input)
        ctx.report = report
        if not adapted_hidden._is_view():
            # Returned as it is, without a copy, and still open to in-place operations downstream.
            ctx.mark_dirty(adapted_hidden)
        return adapted_hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (hidden_gradient,) = gradients
        (hidden_input,) = ctx.saved_tensors
        ctx.report(hidden_input, hidden_gradient)
        return hidden_gradient, None, None, None


def _same_tensor(tensor: Tensor) -> Tensor:
    """The tensor that this one is a mere reshape of, rows kept; else itself."""
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or base.shape[-1:] != tensor.shape[-1:]:
        return tensor
    return base if base.is_contiguous() and tensor.is_contiguous() else tensor


class Taps:
    """Hooks on every site of a base model.

    Attributes:
        stall_seconds: time spent waiting for parameters so far.
        installed_bytes: parameters that came back so far.
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
        self._placement = placement
        self._sink = sink
        self._source = source
        self._phase = _Phase.idle
        self._version = 0
        self._rows: UserRows | None = None
        self._installed: dict[SiteName, int] = {}
        self._num_open: dict[SiteName, int] = {}
        self._has_checked_sites = False
        device = next(base_model.parameters()).device
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self.stall_seconds = 0.0
        self.installed_bytes = 0
        self._handles = []
        for site in self._sites:
            module = base_model.get_submodule(site)
            before, after = partial(self._before, site), partial(self._after, site)
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    @contextmanager
    def recording(self, version: int, rows: UserRows | None = None) -> Iterator[Callable[[], None]]:
        """One training step, with the parameters of adaptation `version`.

        Yields a function to call between the forward and the backward pass. `rows` says whose rows
        the batch has, where users have adapters of their own.

        Raises:
            SiteError: a site did not run in the first recorded step.
        """
        self._version = version
        self._rows = rows
        self._num_open = dict.fromkeys(self._sites, 0)
        self._phase = _Phase.forward
        try:
            yield self._begin_backward
        finally:
            self._phase = _Phase.idle

    def install_all(self, version: int) -> None:
        """Brings every site to one version; the source must have drained."""
        self._version = version
        for site in self._sites:
            self._install(site)

    @contextmanager
    def placed(self, placement: Placement) -> Iterator[None]:
        """Another placement for a while; the caller installs into it."""
        usual = self._placement
        usual.remove()
        self._placement = placement
        try:
            yield
        finally:
            placement.remove()
            self._placement = usual
            self._installed.clear()
            self.install_all(self._version)

    def forget(self) -> None:
        """Makes the next forward pass install afresh, after parameters were loaded."""
        self._installed.clear()

    def remove(self) -> None:
        """Takes the hooks off and leaves the base model as it was found."""
        for handle in self._handles:
            handle.remove()
        self._placement.remove()

    def _begin_backward(self) -> None:
        silent = [site for site, num in self._num_open.items() if num == 0]
        if silent and not self._has_checked_sites:
            raise SiteError(
                f"sites {silent[:3]} ({len(silent)} of {len(self._sites)}) did not run in the "
                "forward pass: leave them out of model.sites"
            )
        self._has_checked_sites = True
        self._phase = _Phase.backward

    def _install(self, site: SiteName) -> None:
        if self._installed.get(site) == self._version:
            return
        start = time.perf_counter()
        published = self._source.wait(site, self._version)
        self.stall_seconds += time.perf_counter() - start
        self._placement.install(site, published)
        self.installed_bytes += sum(tensor.nbytes for tensor in published.values())
        self._installed[site] = self._version

    def _before(self, site: SiteName, module: nn.Module, args: Any) -> None:
        if self._phase is _Phase.forward:
            self._install(site)

    def _after(
        self,
        site: SiteName,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        hidden: Tensor,
    ) -> Tensor:
        hidden_input = args[0] if args else next(iter(kwargs.values()))
        adapted_hidden = self._placement.adapt(site, hidden_input, hidden)
        if self._phase is _Phase.idle:
            return adapted_hidden
        if self._phase is _Phase.forward:
            self._require_graph(site)
            self._num_open[site] += 1
        report = partial(self._report, site)
        # A view is tapped at its base (Conv1D returns one): it stays open to in-place operations.
        whole = _same_tensor(adapted_hidden)
        tapped: Tensor = _TapGradient.apply(  # type: ignore[no-untyped-call]
            whole, hidden_input.detach(), self._anchor, report
        )
        return tapped if whole is adapted_hidden else tapped.view(adapted_hidden.shape)

    def _require_graph(self, site: SiteName) -> None:
        if not torch.is_grad_enabled():
            raise SiteError(
                f"site {site!r} ran with gradients disabled inside a training step, as reentrant "
                "gradient checkpointing does; on a frozen base model that loses every hidden "
                "gradient: use non-reentrant checkpointing (model.gradient_checkpointing=true)"
            )

    def _report(self, site: SiteName, hidden_input: Tensor, hidden_gradient: Tensor) -> None:
        spec = self._sites[site]
        # Under autocast x may be wider than the product that the site made of it: what was
        # multiplied is x rounded, so rounding it here too is exact, and halves the wire.
        hidden_input = hidden_input.to(hidden_gradient.dtype)
        data = AdaptationData(
            hidden_input=flatten_rows(hidden_input, spec),
            hidden_gradient=flatten_rows(hidden_gradient, spec),
            rows=self._rows,
        )
        self._sink.put(site, data)
        self._num_open[site] -= 1
        if self._num_open[site] == 0:
            self._sink.close(site)
