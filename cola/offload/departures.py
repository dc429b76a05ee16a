"""Tensors of the base device that copies under way still read."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

LEAVING_BYTES = 64 << 20
"""Data that the base device holds while it is copied: some blocks of a large model, or one that is
larger. Copies beyond it are waited for, and have been done for long if the wire keeps up."""


class _Departure(NamedTuple):
    """Copies that read the same memory.

    Attributes:
        sources: what they read.
        memory: addresses of what it lies in.
        num_bytes: of the sources.
        arrived: passed when the last of them is done.
    """

    sources: list[Tensor]
    memory: set[int]
    num_bytes: int
    arrived: torch.cuda.Event


class Departures:
    """Holds what copies read, in their order and within bounds.

    The allocator would hold it, too (`record_stream`), but until the host sees that a copy is done:
    a host that is ahead of the GPU by a backward pass would take new memory for all of it.

    Attributes:
        num_bytes: held now.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._held: deque[_Departure] = deque()

    def add(
        self, sources: list[Tensor], arrived: torch.cuda.Event, base: torch.cuda.Stream
    ) -> None:
        """A copy of these tensors has been issued.

        What lies in one memory (all that a replayed block hands over) counts as one: to wait for
        the first half of it before the second has been copied would free nothing.

        Args:
            sources: that it reads.
            arrived: passed when it is done.
            base: the stream that tensors come from, and that waits for the oldest copies.
        """
        memory = {source.untyped_storage().data_ptr() for source in sources}
        if self._held and memory <= self._held[-1].memory:
            before = self._held.pop()
            self.num_bytes -= before.num_bytes
            sources, memory = [*before.sources, *sources], before.memory
        num_bytes = sum(source.nbytes for source in sources)
        self.let_go(base, max(0, LEAVING_BYTES - num_bytes))
        self._held.append(_Departure(sources, memory, num_bytes, arrived))
        self.num_bytes += num_bytes

    def let_go(self, base: torch.cuda.Stream, limit: int = 0) -> None:
        """Holds no more than `limit` bytes; what the stream does from here on comes after them."""
        while self.num_bytes > limit:
            oldest = self._held.popleft()
            base.wait_event(oldest.arrived)
            self.num_bytes -= oldest.num_bytes
