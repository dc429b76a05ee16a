"""Stands in for CUDA graphs on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Rerun:
    """Captures by remembering the work, and replays by doing it again.

    Attributes:
        num_captures: graphs so far.
        num_replays: of them.
        released: memory, and how many graphs had been captured when it was.
    """

    held_bytes = 0

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0
        self.released: list[tuple[int, Tensor]] = []

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def capture(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        self.num_captures += 1
        number = self.num_captures
        written = [tensor.clone().fill_(torch.nan) for tensor in work()]

        def replay() -> None:
            self.num_replays += 1
            for since, memory in self.released:
                if since < number:  # what was released before this was captured lies open to it
                    memory.fill_(torch.nan)
            with torch.enable_grad():  # a node of autograd replays
                again = work()
            for memory, tensor in zip(written, again, strict=True):
                memory.copy_(tensor)

        return written, replay

    def alias(self, tensor: Tensor) -> Tensor:
        self.released.append((self.num_captures, tensor))
        return tensor.view_as(tensor)
