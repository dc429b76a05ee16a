"""Captures work as CUDA graphs that share one pool of memory."""

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from cola.meters import keep_peak

_ONE_AT_A_TIME = threading.RLock()
"""What goes around one capture, of this device or another, must not fall into the next."""


class CudaCapturer:
    """Captures on one GPU; workers and copies may go on meanwhile."""

    def __init__(self, device: torch.device) -> None:
        """Makes a pool; it takes memory when something is captured."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._peak = 0

    @property
    def held_bytes(self) -> int:
        """What replays use at their peak, and the allocator does not count as allocated."""
        return max(0, self._peak - self._allocated()) if self._peak else 0

    @contextmanager
    def session(self) -> Iterator[None]:
        """Around captures that belong together."""
        # Nothing of ours is under way, and what nobody needs does not get in between.
        with _ONE_AT_A_TIME:
            gc.collect()
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            keep_peak(self._device, self.held_bytes)
            around = torch.cuda.memory_allocated(self._device) - self._allocated()
            yield
            torch.cuda.synchronize(self._device)
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device) - around)
            torch.cuda.reset_peak_memory_stats(self._device)

    def _allocated(self) -> int:
        """Bytes of the pool that somebody owns."""
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        own = [one for one in segments if tuple(one["segment_pool_id"]) == tuple(self._pool)]
        return sum(segment["allocated_size"] for segment in own)

    def capture(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Tensors whose memory a replay writes, and the replay."""
        graph = torch.cuda.CUDAGraph()
        with _ONE_AT_A_TIME, torch.cuda.stream(self._stream):
            # Other threads may allocate and wait meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                written = work()
            except BaseException:
                with suppress(RuntimeError):  # says only that something went wrong before
                    graph.capture_end()
                raise
            with warnings.catch_warnings():  # a block may hand on a gradient as it got it
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")
                graph.capture_end()
        return written, graph.replay

    def alias(self, tensor: Tensor) -> Tensor:
        """The same memory, but open to be used by later captures."""
        view = _Memory(tensor.data_ptr(), _span(tensor))
        flat = torch.as_tensor(view, device=tensor.device).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())


class _Memory:
    """Bytes of a GPU, for torch to look at without owning them."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _span(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()
