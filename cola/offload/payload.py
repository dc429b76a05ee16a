"""What of a site leaves the base device: its factors, or the gradient that they make.

Factors are the paper's: hidden input and hidden gradient, whose product the offload device forms.
Forming a linear adapter's gradient takes the base device one more product of the size of its own
backward pass; forming it on a host's CPU may take seconds. It travels in the type that it is summed
in, and of a float32 model is smaller than its factors once a batch has more than D H / (D + H)
tokens. Both are exact.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from cola.adapters import Adapter, LinearAdapter
from cola.config.choices import Payload
from cola.offload.timing import gradient_seconds, median_seconds
from cola.sites import SiteKind, SiteName, SiteSpec
from cola.user_adapters import num_parameters

logger = logging.getLogger(__name__)

MEASURED_BYTES = 32 << 20
"""Size of the copy that the wire is measured with."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """What sending one site's data costs its slowest part, per batch."""

    factors: float
    gradient: float

    @property
    def best(self) -> Payload:
        """The faster one; the paper's on a tie."""
        return Payload.gradient if self.gradient < self.factors else Payload.factors


def choose_payloads(
    adapters: Mapping[SiteName, Adapter],
    *,
    payload: Payload,
    base: torch.device,
    dtype: torch.dtype,
    wire: torch.dtype | None,
    num_rows: int,
    eligible: Callable[[Adapter], bool],
) -> dict[SiteName, Payload]:
    """The payload of every site.

    Args:
        adapters: by site, where they are fitted.
        payload: of the configuration; `auto` measures each shape once, on this machine.
        base: the base model's device.
        dtype: of adaptation data.
        wire: what is rounded to on the wire; None: nothing is.
        num_rows: N, of a whole batch.
        eligible: whether `auto` may form an adapter's gradient on the base device.
    """
    if payload is not Payload.auto:
        return dict.fromkeys(adapters, payload)
    measured: dict[tuple[object, ...], Seconds] = {}
    chosen = {}
    for site, adapter in adapters.items():
        chosen[site] = Payload.factors
        if adapter.spec.kind is SiteKind.conv2d or not eligible(adapter):
            continue
        shapes = tuple(parameter.shape for parameter in adapter.parameters())
        if shapes not in measured:
            measured[shapes] = _measure(adapter, base, dtype, wire, num_rows)
            _log(adapter.spec, measured[shapes], num_rows)
        chosen[site] = measured[shapes].best
    return chosen


def may_form(merged: bool, base_gradients: bool) -> Callable[[Adapter], bool]:
    """Whose gradient `auto` may form on the base device.

    A linear adapter's does not depend on its parameters. Another's does, which are there only
    unmerged; and it makes of gradient learning ordinary back-propagation with an offloaded
    optimizer, so that it has to be asked for.
    """
    return lambda adapter: isinstance(adapter, LinearAdapter) or (base_gradients and not merged)


def _measure(
    adapter: Adapter,
    base: torch.device,
    dtype: torch.dtype,
    wire: torch.dtype | None,
    num_rows: int,
) -> Seconds:
    """Of the wire, of the worker, and of the base device, each alone; the slowest counts."""
    spec, home = adapter.spec, next(adapter.parameters()).device
    rate = _wire_rate(base, home)
    arrives, master = wire or dtype, next(adapter.parameters()).dtype
    factor_bytes = num_rows * (spec.in_features + spec.out_features) * arrives.itemsize
    gradient_bytes = num_parameters(adapter) * (wire or master).itemsize
    return Seconds(
        factors=max(factor_bytes / rate, gradient_seconds(adapter, home, arrives, num_rows)),
        gradient=max(gradient_bytes / rate, gradient_seconds(adapter, base, dtype, num_rows)),
    )


def _wire_rate(base: torch.device, home: torch.device) -> float:
    """Bytes per second from the base device; without a wire, infinity."""
    if base == home or base.type == "cpu":
        return float("inf")
    here = torch.empty(MEASURED_BYTES, dtype=torch.uint8, device=base)
    there = torch.empty_like(here, device=home, pin_memory=home.type == "cpu")
    seconds = median_seconds(lambda: [there.copy_(here, non_blocking=True)], [base, home])
    return MEASURED_BYTES / seconds


def _log(spec: SiteSpec, seconds: Seconds, num_rows: int) -> None:
    logger.info(
        "offload.payload=auto: %s for sites of %d x %d like %s (%d rows: %.2f ms a batch by its "
        "factors, %.2f ms by its gradient)",
        seconds.best.name,
        spec.out_features,
        spec.in_features,
        spec.name,
        num_rows,
        1e3 * seconds.factors,
        1e3 * seconds.gradient,
    )
