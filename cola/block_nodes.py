"""Nodes of autograd's graph at a captured block: where it begins, and the whole of it, replayed."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Replayable(Protocol):
    """Both passes of a block."""

    def forward(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
        """Outputs, and which of them can be differentiated."""

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs, from those of the outputs."""


class Entrance(torch.autograd.Function):
    """Where a block begins: what leads up to it is not part of its graph.

    A leaf would do, were it not held by its own node for as long as the graph is.
    """

    @staticmethod
    def forward(ctx: Any, memory: Tensor, anchor: Tensor) -> Tensor:  # noqa: D102
        return memory.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:  # noqa: D102
        return None, None


class Replayed(torch.autograd.Function):
    """A block, replayed, as one node of the graph."""

    @staticmethod
    def forward(  # noqa: D102, what autograd asks for
        ctx: Any, block: Replayable, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.block = block
        outputs, differentiable = block.forward(tensors)
        ctx.mark_non_differentiable(
            *(output for output, is_one in zip(outputs, differentiable, strict=True) if not is_one)
        )
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # noqa: D102
        return None, None, *ctx.block.backward(gradients)
