"""Memory of the host that adaptation data lands in: pinned once, and used over and over."""

import weakref
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Block = NDArray[np.uint8]


def pinned(num_bytes: int) -> Tensor:
    """Fresh memory that a GPU copies to without the host."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class Staging:
    """Blocks of memory for what one wire delivers, which brings one thing after the other.

    PyTorch keeps pinned memory, too, but gives it out again only when what was issued on the wire
    before it became free is done, which the host is ahead of; and while it pins more (13 to 20 ms
    for 32 MiB were seen), the base model's host stands still. A block is free here as soon as
    nobody reads it: what comes next is behind everything that was to be written there.

    Attributes:
        num_bytes: pinned so far.
    """

    def __init__(self, pin: Callable[[int], Tensor] = pinned) -> None:
        """`pin` gives memory of a number of bytes."""
        self._pin = pin
        self._free: defaultdict[int, list[Block]] = defaultdict(list)
        self.num_bytes = 0

    def take(self, like: Tensor) -> Tensor:
        """Memory for a copy of a tensor, laid out like it; free again with its last view."""
        size = 1 << max(0, like.nbytes - 1).bit_length()  # what PyTorch pins, too
        free = self._free[size]
        block = free.pop() if free else self._more(size)
        used = block[: like.nbytes]  # an array of its own: the tensor is all that holds it
        weakref.finalize(used, free.append, block).atexit = False
        form = torch.empty_like(like, device="meta")
        memory = torch.from_numpy(used).view(like.dtype)
        return memory.as_strided(form.shape, form.stride())

    def _more(self, size: int) -> Block:
        self.num_bytes += size
        return self._pin(size).numpy()
