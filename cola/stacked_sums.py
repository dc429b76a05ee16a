"""Merged weights of many sites by one product, for GPUs: `rounded_sums` in bulk.

A GPU merges a weight faster than a host launches what it takes. Weights of one shape therefore lie
in one memory, and a stack of them is merged by one batched product and one sum. That takes a
float32 copy of the stack for a moment, where `rounded_sums` takes a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cola.rounded_sums import Update


class WeightStack:
    """Weights of one shape, and what they are merged with.

    Attributes:
        weights: (P, H, D), as they were found.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Copies P weights, (H, D) each."""
        self.weights = torch.stack(list(weights))

    @torch.no_grad()
    def merged(self, left: Tensor, right: Tensor, *, scale: float) -> Tensor:
        """round(weight + scale * left @ right), (P, H, D), rounded once.

        A batched product of bfloat16 that adds to its output would round the product first.

        Args:
            left: (P, H, R) in float32.
            right: (P, R, D) in float32.
            scale: factor of the product.
        """
        product = torch.bmm(left, right)
        return torch.add(self.weights, product, alpha=scale, out=torch.empty_like(self.weights))


def factors(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """Left and right factors of P updates, stacked: (P, H, R) and (P, R, D)."""
    right = [update.right for update in updates if update.right is not None]
    return torch.stack([update.left for update in updates]), torch.stack(right)
