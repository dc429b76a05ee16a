"""Merged weights of many sites by one product, for GPUs: `rounded_sums` in bulk.

A GPU merges a weight faster than a host launches what it takes. Weights of one shape therefore lie
in one memory, and a stack of them is merged by one batched product that reads and writes every
entry once. It is a product of bfloat16, summed in float32 by tensor cores together with the weight
and rounded once; the factors, of float32, are cut into bfloat16 parts that hold all of their bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cola.rounded_sums import Update

PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
"""Parts of both factors that are multiplied: the others are below float32's last bit."""


class WeightStack:
    """Weights of one shape, in bfloat16, and what they are merged with.

    Attributes:
        weights: (P, H, D), as they were found.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Copies P weights, (H, D) each."""
        self.weights = torch.stack(list(weights))

    @torch.no_grad()
    def merged(self, left: Tensor, right: Tensor, *, scale: float) -> Tensor:
        """round(weight + scale * left @ right), (P, H, D).

        Args:
            left: (P, H, R) in float32.
            right: (P, R, D) in float32.
            scale: factor of the product.
        """
        return torch.baddbmm(self.weights, *in_parts(left, right), alpha=scale)


def factors(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """Left and right factors of P updates, stacked: (P, H, R) and (P, R, D)."""
    right = [update.right for update in updates if update.right is not None]
    return torch.stack([update.left for update in updates]), torch.stack(right)


def in_parts(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of P products, (P, H, R) and (P, R, D), as (P, H, 6R) and (P, 6R, D) in bfloat16.

    Their product is the same, but for what float32 has no bits for.
    """
    left_parts, right_parts = split_bfloat16(left), split_bfloat16(right)
    return (
        torch.cat([left_parts[i] for i, _ in PAIRS], dim=2),
        torch.cat([right_parts[j] for _, j in PAIRS], dim=1),
    )


def split_bfloat16(exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bfloat16 tensors whose sum is a float32 tensor, bit for bit: 24 bits, 8 in each."""
    first = exact.bfloat16()
    rest = exact - first
    second = rest.bfloat16()
    return first, second, (rest - second).bfloat16()
