"""Large host tensors that are used again: fresh ones cost more to page in than to compute."""

import threading

import torch
from torch import Tensor

MIN_BYTES = 1 << 20
"""Smaller tensors come from memory that the process has already."""


def is_reused(tensor: Tensor) -> bool:
    """Whether its memory is used again, here or, if it is pinned, for data that comes."""
    return tensor.nbytes >= MIN_BYTES and tensor.device.type == "cpu"


class Buffers:
    """Tensors that nobody uses at the moment, by shape and dtype. Threads may share it.

    Attributes:
        peak_bytes: the most that was here at once: all there is of it, whenever nobody uses any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._free_bytes = self.peak_bytes = 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A host tensor of any values, to be given back or simply dropped."""
        if shape.numel() * dtype.itemsize >= MIN_BYTES:
            with self._lock:
                free = self._free.get((shape, dtype))
                if free:
                    self._free_bytes -= free[-1].nbytes
                    return free.pop()
        return torch.empty(shape, dtype=dtype)

    def give(self, tensor: Tensor) -> None:
        """Takes a tensor back that `take` gave, or any other that its owner has done with.

        Pinned memory is for data that comes; it has an allocator of its own.
        """
        if is_reused(tensor) and tensor.is_contiguous() and not tensor.is_pinned():
            with self._lock:
                self._free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
                self._free_bytes += tensor.nbytes
                self.peak_bytes = max(self.peak_bytes, self._free_bytes)
