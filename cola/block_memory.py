"""Memory that captured graphs read and write, and who captures them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Replay = Callable[[], None]


class Capturer(Protocol):
    """Turns work into something that can be repeated."""

    @property
    def held_bytes(self) -> int:
        """What replays use, and the allocator counts as free."""

    def session(self) -> AbstractContextManager[None]:
        """Around captures that belong together."""

    def capture(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Replay]:
        """Tensors whose memory a replay writes, and the replay; nothing is computed before."""

    def alias(self, tensor: Tensor) -> Tensor:
        """The same memory, but open to be used by later captures."""


@dataclass(kw_only=True)
class Buffer:
    """Where a captured graph reads something.

    Attributes:
        memory: as it was captured.
        is_borrowed: whether another graph writes it.
        source: what was copied there in this step; blocks with an input in common share it.
    """

    memory: Tensor
    is_borrowed: bool = False
    source: Tensor | None = None

    def fill(self, tensor: Tensor) -> None:
        """Copies, unless it is there already."""
        if tensor is not self.source and tensor.data_ptr() != self.memory.data_ptr():
            self.memory.copy_(tensor)
            self.source = tensor
