"""Products of low-rank fits on a GPU, captured and replayed.

A fit of many small adapters is many small products, and launching them takes a worker longer than
the GPU needs, in an interpreter that the base model's host wants, too. Adaptation data has to be
stacked for these products anyway: it is stacked where a captured graph reads it. What is captured
comes again and again in one shape; rows that change from batch to batch are worked on as ever.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cola.adapters import LowRankAdapter
from cola.gradient_learning import AdapterGradients, stacked_products

PARAMETERS = ("lora_a", "lora_b")

MAX_SHAPES = 8
"""Numbers of rows that the products of the same adapters are captured for."""


class Captures(Protocol):
    """Turns work on a GPU into something that can be repeated."""

    def capture(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Tensors whose memory a replay writes, and the replay; nothing is computed before."""


class _Captured(NamedTuple):
    """A captured product.

    Attributes:
        into: where inputs, then gradients are copied.
        replay: the product.
        found: what it leaves.
    """

    into: list[Tensor]
    replay: Callable[[], None]
    found: list[AdapterGradients]


_Adapters = tuple[int, ...]
_Shape = tuple[torch.Size, torch.dtype]


class ProductReplays:
    """Captured products of one worker, whose tasks run one after another on one stream."""

    def __init__(self, capturer: Captures) -> None:
        """Captures nothing yet."""
        self._capturer = capturer
        self._seen: dict[_Adapters, set[_Shape]] = {}
        self._captured: dict[tuple[_Adapters, _Shape], _Captured] = {}
        self._stacks: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def gradients(
        self,
        adapters: Sequence[Sequence[LowRankAdapter]],
        inputs: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor]],
        scale: float,
    ) -> list[AdapterGradients] | None:
        """`stacked_lowrank_gradients`, replayed; None if this was not captured.

        What is returned is overwritten by the next call with the same adapters and shape.
        """
        who = tuple(id(adapter) for own in adapters for adapter in own)
        shape = (inputs[0].shape, inputs[0].dtype)
        captured = self._captured.get((who, shape))
        if captured is None:
            seen = self._seen.setdefault(who, set())
            if shape not in seen:
                if len(seen) < MAX_SHAPES:
                    seen.add(shape)
                return None
            captured = self._capture(adapters, inputs, gradients, scale)
            self._captured[who, shape] = captured
        flat = [gradient for own in gradients for gradient in own]
        torch._foreach_copy_(captured.into, [*inputs, *flat])
        captured.replay()
        return captured.found

    def _capture(
        self,
        adapters: Sequence[Sequence[LowRankAdapter]],
        inputs: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor]],
        scale: float,
    ) -> _Captured:
        flat = [gradient for own in gradients for gradient in own]
        x, g = self._memory(inputs, 0), self._memory(flat, 1)

        def work() -> list[Tensor]:
            found = stacked_products(adapters, x, g, scale)
            return [named[name] for own in found for named in own for name in PARAMETERS]

        written, replay = self._capturer.capture(work)
        stream = iter(written)
        found = [[{name: next(stream) for name in PARAMETERS} for _ in own] for own in adapters]
        return _Captured([*x.unbind(), *g.unbind()], replay, found)

    def _memory(self, parts: Sequence[Tensor], index: int) -> Tensor:
        """Where parts are stacked; other products of such a shape use it after this one."""
        size = torch.Size([len(parts), *parts[0].shape])
        own = self._stacks.setdefault((size, parts[0].dtype), [])
        while len(own) <= index:
            own.append(torch.empty(size, dtype=parts[0].dtype, device=parts[0].device))
        return own[index]
