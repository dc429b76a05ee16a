"""Clocks and memory readings, per device.

Work on a GPU is asynchronous: a timer records events there and reads them later, so that measuring
never stalls the base device. On the CPU there is no allocator to ask, so bytes held are counted by
owner.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

MIB = 2**20


class BusyTimer:
    """Total time a device spends inside `measure()` blocks, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Times the work issued inside, on the host for a CPU and by events for a GPU."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - start
            return
        stream = torch.cuda.current_stream(self._device)
        begin, end = (_timing_event() for _ in range(2))
        begin.record(stream)
        try:
            yield
        finally:
            end.record(stream)
            self._pending.append((begin, end))

    def read(self) -> float:
        """Seconds so far; waits for the device."""
        while self._pending:  # another thread may go on adding
            begin, end = self._pending.popleft()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages, so that tied weights and views count once; meta tensors too."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def add_held(held: dict[str, dict[str, int]], device: torch.device, owner: str, num: int) -> None:
    """Adds bytes of one owner to a device's account."""
    account = held.setdefault(str(device), {})
    account[owner] = account.get(owner, 0) + num


GRAPHS = "graphs"
"""Owner of memory that captured graphs use while the allocator counts it as free."""

_kept_peaks: dict[torch.device, int] = {}  # reached before the allocator was told to start anew


def reset_peaks(devices: Iterable[torch.device]) -> None:
    """Forgets peaks reached before, so that training is metered apart."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            _kept_peaks.pop(device, None)


def keep_peak(device: torch.device, graphs: int) -> None:
    """Remembers a GPU's peak, graphs included; what is allocated is metered anew from here."""
    peak = torch.cuda.max_memory_allocated(device) + graphs
    _kept_peaks[device] = max(_kept_peaks.get(device, 0), peak)
    torch.cuda.reset_peak_memory_stats(device)


def peak_allocated(device: torch.device, held: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes allocated on a GPU at its peak, memory of captured graphs included."""
    now = torch.cuda.max_memory_allocated(device) + held.get(str(device), {}).get(GRAPHS, 0)
    return max(now, _kept_peaks.get(device, 0))


def peak_mib(held: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Peak memory per device in MiB: allocated on a GPU, bytes held by owners on a CPU."""
    peaks = {}
    for name, owners in held.items():
        if torch.device(name).type == "cuda":
            peaks[name] = peak_allocated(torch.device(name), held) / MIB
        else:
            peaks[name] = sum(owners.values()) / MIB
    return peaks


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    return float(psutil.Process().memory_info().rss) / MIB
