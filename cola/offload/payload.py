"""What of a site leaves the base device: its factors, or the gradient that they make.

Factors are the paper's: hidden input and hidden gradient, whose product the offload device forms.
A linear adapter's gradient is smaller than its factors once a batch has more than
D H / (D + H) tokens, and forming it takes the base device one more product of the size of its own
backward pass; forming it on a host's CPU may take seconds. Both are exact.
"""

import copy
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.adapters import Adapter, LinearAdapter
from cola.config.choices import Payload
from cola.gradient_learning import adapter_gradients
from cola.runtime import product_dtype
from cola.sites import SiteKind, SiteName, SiteSpec

logger = logging.getLogger(__name__)

MEASURED_ROWS = 1024
"""Rows that are measured at most; more take proportionally longer."""

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
    num_rows: int,
    eligible: Callable[[Adapter], bool],
) -> dict[SiteName, Payload]:
    """The payload of every site.

    Args:
        adapters: by site, where they are fitted.
        payload: of the configuration; `auto` measures each shape once, on this machine.
        base: the base model's device.
        dtype: of adaptation data.
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
            measured[shapes] = _measure(adapter, base, dtype, num_rows)
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


def _measure(adapter: Adapter, base: torch.device, dtype: torch.dtype, num_rows: int) -> Seconds:
    """Of the wire, of the worker, and of the base device, each alone; the slowest counts."""
    spec, home = adapter.spec, next(adapter.parameters()).device
    rate = _wire_rate(base, home)
    factor_bytes = num_rows * (spec.in_features + spec.out_features) * dtype.itemsize
    gradient_bytes = sum(parameter.numel() for parameter in adapter.parameters()) * dtype.itemsize
    return Seconds(
        factors=max(factor_bytes / rate, _product_seconds(adapter, home, dtype, num_rows)),
        gradient=max(gradient_bytes / rate, _product_seconds(adapter, base, dtype, num_rows)),
    )


def _product_seconds(
    adapter: Adapter, device: torch.device, dtype: torch.dtype, num_rows: int
) -> float:
    rows = min(num_rows, MEASURED_ROWS)
    spec = adapter.spec
    x = torch.randn(rows, spec.in_features, device=device).to(dtype)
    gradient = torch.randn(rows, spec.out_features, device=device).to(dtype)
    data = AdaptationData(hidden_input=x, hidden_gradient=gradient)
    data = data.to(product_dtype(x, next(adapter.parameters()).dtype))
    own = adapter if device == next(adapter.parameters()).device else _copy_to(adapter, device)
    seconds = _median_seconds(lambda: adapter_gradients(own, data, 1.0).values(), [device])
    return seconds * num_rows / rows


def _copy_to(adapter: Adapter, device: torch.device) -> Adapter:
    return copy.deepcopy(adapter).to(device)


def _wire_rate(base: torch.device, home: torch.device) -> float:
    """Bytes per second from the base device; without a wire, infinity."""
    if base == home or base.type == "cpu":
        return float("inf")
    here = torch.empty(MEASURED_BYTES, dtype=torch.uint8, device=base)
    there = torch.empty_like(here, device=home, pin_memory=home.type == "cpu")
    seconds = _median_seconds(lambda: [there.copy_(here, non_blocking=True)], [base, home])
    return MEASURED_BYTES / seconds


def _median_seconds(
    action: Callable[[], Iterable[Tensor]], devices: Iterable[torch.device]
) -> float:
    """Of five, after two that warm up."""
    gpus = [device for device in devices if device.type == "cuda"]
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        action()
        for device in gpus:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


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
