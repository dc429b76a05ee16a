"""Times of a fit's parts on this machine, for choices that are made by measuring."""

import copy
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.adapters import Adapter
from cola.gradient_learning import adapter_gradients
from cola.runtime import product_dtype
from cola.sites import SiteKind
from cola.user_adapters import SiteAdapter, UserAdapters, num_parameters

MEASURED_ROWS = 1024
"""Rows that are measured at most; more take proportionally longer."""

WARM_UP = 2

QUARTERS = 4

logger = logging.getLogger(__name__)


def gradient_seconds(
    adapter: Adapter, device: torch.device, dtype: torch.dtype, num_rows: int
) -> float:
    """Seconds that the gradient of an adapter that is no convolution takes.

    Args:
        adapter: with parameters and optimizer states in float32 or wider.
        device: where it is formed; a copy of the adapter goes there, if it is elsewhere.
        dtype: of adaptation data.
        num_rows: N.
    """
    rows = min(num_rows, MEASURED_ROWS)
    spec = adapter.spec
    master = next(adapter.parameters()).dtype
    # No random numbers: a run must not depend on what was measured before it.
    x = torch.ones(rows, spec.in_features, device=device, dtype=dtype)
    gradient = torch.ones(rows, spec.out_features, device=device, dtype=dtype)
    data = AdaptationData(hidden_input=x, hidden_gradient=gradient).to(product_dtype(x, master))
    is_there = next(adapter.parameters()).device == device
    own = adapter if is_there else copy.deepcopy(adapter).to(device)
    seconds = median_seconds(lambda: adapter_gradients(own, data, 1.0).values(), [device])
    return seconds * num_rows / rows


def relative_speeds(
    adapters: Sequence[SiteAdapter],
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    num_rows: int,
) -> list[float]:
    """How fast devices form an adapter's gradient, in quarters of the fastest's speed.

    Measured with the largest of the adapters; 1.0 for a single device, and where all sites are
    convolutions.
    """
    plain = [adapter for adapter in adapters if adapter.spec.kind is not SiteKind.conv2d]
    if len(devices) < 2 or not plain:
        return [1.0] * len(devices)
    largest = max(plain, key=num_parameters)
    adapter = largest.member(0) if isinstance(largest, UserAdapters) else largest
    own = copy.deepcopy(adapter).to(dtype)
    seconds = [gradient_seconds(own, device, dtype, num_rows) for device in devices]
    speeds = [max(1, round(QUARTERS * min(seconds) / found)) / QUARTERS for found in seconds]
    named = (f"{device} {speed:g}" for device, speed in zip(devices, speeds, strict=True))
    logger.info("offload.device: speeds measured with %s: %s", adapter.spec.name, ", ".join(named))
    return speeds


def median_seconds(
    action: Callable[[], Iterable[Tensor]], devices: Iterable[torch.device]
) -> float:
    """Of five runs, after two that warm up; GPUs are waited for."""
    gpus = [device for device in devices if device.type == "cuda"]
    seconds = []
    for _ in range(WARM_UP + 5):
        start = time.perf_counter()
        action()
        for device in gpus:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])
