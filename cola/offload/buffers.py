"""Large host tensors that are used again: fresh ones cost more to page in than to compute."""

import threading

import torch
from torch import Tensor

MIN_BYTES = 1 << 20
"""Smaller tensors come from memory that the process has already."""


class Buffers:
    """Tensors that nobody uses at the moment, by shape and dtype. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A host tensor of any values, to be given back or simply dropped."""
        if shape.numel() * dtype.itemsize >= MIN_BYTES:
            with self._lock:
                free = self._free.get((shape, dtype))
                if free:
                    return free.pop()
        return torch.empty(shape, dtype=dtype)

    def give(self, tensor: Tensor) -> None:
        """Takes a tensor back that `take` gave, or any other that its owner has done with.

        Pinned memory is for data that comes; it has an allocator of its own.
        """
        is_large = tensor.nbytes >= MIN_BYTES and tensor.device.type == "cpu"
        if is_large and tensor.is_contiguous() and not tensor.is_pinned():
            with self._lock:
                self._free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
