"""Times of a fit's parts on this machine, for choices that are made by measuring."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.adapters import Adapter
from cola.gradient_learning import adapter_gradients
from cola.runtime import product_dtype
from cola.sites import SiteKind
from cola.user_adapters import SiteAdapter, UserAdapters

MEASURED_ROWS = 1024
"""Rows that are measured at most; more take proportionally longer."""

WARM_UP = 2

SECONDS_PER_PRODUCT = 1e-12
"""Of a convolution's fit, for each parameter and row: only the relation to its like matters."""


def gradient_seconds(
    adapter: Adapter, device: torch.device, dtype: torch.dtype, num_rows: int, *, repeats: int = 5
) -> float:
    """Seconds that the gradient of an adapter that is no convolution takes.

    Args:
        adapter: with parameters and optimizer states in float32 or wider.
        device: where it is formed; a copy of the adapter goes there, if it is elsewhere.
        dtype: of adaptation data.
        num_rows: N.
        repeats: runs of which the median counts.
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
    seconds = median_seconds(
        lambda: adapter_gradients(own, data, 1.0).values(), [device], repeats=repeats
    )
    return seconds * num_rows / rows


class FitClock:
    """Seconds of a site's fit, measured once for every shape and kind."""

    def __init__(
        self, device: torch.device, data: torch.dtype, master: torch.dtype, num_rows: int
    ) -> None:
        """Measures on `device`.

        Args:
            device: where adapters will be fitted.
            data: type of adaptation data.
            master: type of parameters and optimizer states.
            num_rows: N, of a whole batch.
        """
        self._device, self._data, self._master = device, data, master
        self._num_rows = num_rows
        self._measured: dict[tuple[object, ...], float] = {}

    def seconds(self, adapter: SiteAdapter) -> float:
        """Of one site; rows of several users are taken to be shared evenly."""
        if not isinstance(adapter, UserAdapters):
            return self._of_one(adapter, self._num_rows)
        num_users = len(adapter.roster)
        parts = [
            (adapter.member(stack.first), stack.last - stack.first) for stack in adapter.stacks
        ]
        return sum(
            self._of_one(member, max(1, self._num_rows * number // num_users))
            for member, number in parts
        )

    def _of_one(self, adapter: Adapter, num_rows: int) -> float:
        shapes = tuple(parameter.shape for parameter in adapter.parameters())
        key = (type(adapter), adapter.spec.kind, shapes, num_rows)
        if key not in self._measured:
            self._measured[key] = self._measure(adapter, num_rows)
        return self._measured[key]

    def _measure(self, adapter: Adapter, num_rows: int) -> float:
        if adapter.spec.kind is SiteKind.conv2d:
            # How many pixels there are is not known before a batch: as if they were the rows.
            num = sum(parameter.numel() for parameter in adapter.parameters())
            return num * num_rows * SECONDS_PER_PRODUCT
        own = copy.deepcopy(adapter).to(self._device, self._master)
        return gradient_seconds(own, self._device, self._data, num_rows, repeats=1)


def median_seconds(
    action: Callable[[], Iterable[Tensor]], devices: Iterable[torch.device], *, repeats: int = 5
) -> float:
    """Of some runs, after others that warm up; GPUs are waited for."""
    gpus = [device for device in devices if device.type == "cuda"]
    seconds = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        action()
        for device in gpus:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])
