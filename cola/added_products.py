"""Low-rank adapters beside a site, as one node of the graph: h + scale * B A x in the memory of h.

The two small products cost less than launching them; a large model has hundreds of sites, and its
host is busy enough.
"""

from typing import Any

import torch
from torch import Tensor

from cola.adapters import LowRankAdapter
from cola.sites import SiteKind
from cola.user_adapters import SiteAdapter, UserAdapters


def add_lowrank(
    hidden: Tensor, hidden_input: Tensor, adapter: SiteAdapter, scale: float
) -> Tensor | None:
    """Adapted hidden representation, (..., H); None if it has to be formed another way.

    Args:
        hidden: (..., H), the site's own output, which is changed.
        hidden_input: (..., D).
        adapter: with the parameters in effect.
        scale: alpha; users have their own beside it.
    """
    if adapter.spec.kind is SiteKind.conv2d or not _is_own(hidden, hidden_input):
        return None
    found: tuple[Tensor, Tensor, Tensor | None] | None = None
    if isinstance(adapter, LowRankAdapter):
        found = adapter.lora_a, adapter.lora_b, None
    elif isinstance(adapter, UserAdapters):
        found = adapter.stacked_factors(hidden_input)
    if found is None or found[0].dtype is not hidden.dtype:
        return None
    adapted: Tensor = _AddLowRank.apply(  # type: ignore[no-untyped-call]
        hidden, hidden_input, *found, scale
    )
    return adapted


def _is_own(hidden: Tensor, hidden_input: Tensor) -> bool:
    """Whether the sum may be formed in the site's own output: nobody else has seen it yet."""
    return not hidden._is_view() and hidden.is_contiguous() and hidden.dtype is hidden_input.dtype


class _AddLowRank(torch.autograd.Function):
    """One adapter, (R, D) and (H, R), or one of each of S equal parts of the rows, (S, ...)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        hidden_input: Tensor,
        a: Tensor,
        b: Tensor,
        alphas: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(a, b, alphas)
        ctx.scale, ctx.shape = scale, hidden_input.shape
        if a.dim() == 2:
            inner = hidden_input.reshape(-1, a.shape[1]) @ a.T  # (N, R)
            hidden.view(-1, b.shape[0]).addmm_(inner, b.T, alpha=scale)
        else:
            inner = torch.bmm(_parts(hidden_input, a), a.mT)  # (S, c, R)
            inner = inner if alphas is None else inner * alphas
            hidden.view(len(b), -1, b.shape[1]).baddbmm_(inner, b.mT, alpha=scale)
        ctx.mark_dirty(hidden)
        return hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_gradient,) = gradients
        if not ctx.needs_input_grad[1]:
            return hidden_gradient, None, None, None, None, None
        a, b, alphas = ctx.saved_tensors
        if a.dim() == 2:
            inner = hidden_gradient.reshape(-1, b.shape[0]) @ b  # (N, R)
        else:
            inner = torch.bmm(_parts(hidden_gradient, b.mT), b)  # (S, c, R)
        inner = inner if alphas is None else inner * alphas
        inner = inner if ctx.scale == 1.0 else inner * ctx.scale
        return hidden_gradient, (inner @ a).view(ctx.shape), None, None, None, None


def _parts(rows: Tensor, factor: Tensor) -> Tensor:
    """(..., D) as S equal parts, (S, c, D), for a factor (S, R, D)."""
    return rows.reshape(len(factor), -1, factor.shape[-1])
