"""The paper's equations as pure functions: from (x, hidden gradient) to an adapter's gradient.

Symbols here and only here: x hidden input, g hidden gradient, w adapter parameters. Everything is
summed over rows, never averaged: the hidden gradient already carries the task loss's averaging.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from cola.adaptation_data import AdaptationData
from cola.adapters import Adapter, LinearAdapter, LowRankAdapter
from cola.sites import SiteKind


def surrogate_loss(adapter_output: Tensor, hidden_gradient: Tensor) -> Tensor:
    """Half squared residual whose parameter gradient equals back-propagation's.

    Paper: Sec. 3.1, Eq. (6) and Proposition 1. Differs: the target (output minus gradient) is never
    formed, because subtracting a small gradient from an output loses it; the two equal outputs are
    subtracted first, which is exactly zero.

    Args:
        adapter_output: scale * g_w(x), shape (N, H), attached to the graph.
        hidden_gradient: task-loss gradient, shape (N, H), detached, same dtype.

    Returns:
        Scalar, summed over rows (the task loss has done its averaging).
    """
    residual = (adapter_output - adapter_output.detach()) + hidden_gradient
    return 0.5 * residual.square().sum()


def surrogate_gradients(adapter: Adapter, data: AdaptationData, scale: float) -> dict[str, Tensor]:
    """Gradient of Eq. (6) at the current w, for any adapter.

    Paper: Algorithm 1, lines 13 and 14.

    Args:
        adapter: g_w.
        data: x (N, D) and g (N, H) on the adapter's device; products are formed in their dtype.
        scale: alpha, the factor on the adapter's output, hence on its gradient.

    Returns:
        Gradient by parameter name, shapes of the parameters, in the dtype of the data.
    """
    dtype = data.hidden_input.dtype
    own = dict(adapter.named_parameters())
    is_usable = all(p.requires_grad and p.dtype is dtype for p in own.values())
    used: dict[str, Tensor] = dict(own)
    if not is_usable:
        used = {n: p.detach().to(dtype).requires_grad_() for n, p in own.items()}
    with torch.enable_grad():
        x = data.hidden_input
        output = adapter(x) if is_usable else functional_call(adapter, used, (x,))
    # The gradient of the surrogate loss by the output is the hidden gradient, times the scale.
    gradient = _scaled(data.hidden_gradient, scale)
    return dict(zip(used, torch.autograd.grad(output, list(used.values()), gradient), strict=True))


def linear_gradients(
    adapter: LinearAdapter, data: AdaptationData, scale: float, out: Tensor | None = None
) -> dict[str, Tensor]:
    """Closed form for g_w(x) = x W' + b: dW = scale * G'X, db = scale * sum of G over rows.

    `out` is memory for dW, (H, D) in the dtype of the data.
    """
    g = _scaled(data.hidden_gradient, scale)  # (N, H)
    gradients = {"weight": torch.mm(g.T, data.hidden_input, out=out)}  # (H, D)
    if adapter.bias is not None:
        gradients["bias"] = g.sum(dim=0)  # (H,)
    return gradients


def inner_products(adapters: Sequence[LowRankAdapter], x: Tensor) -> list[Tensor]:
    """A x of each adapter, (R, N), for x (N, D): what its gradient needs of x and w alone."""
    down = joined([adapter.lora_a for adapter in adapters], dim=0).to(x.dtype)  # (sum of R, D)
    return list(torch.split_with_sizes(_few_by_long(down, x), _ranks(adapters)))


def lowrank_gradients(
    adapters: Sequence[LowRankAdapter],
    x: Tensor,
    gradients: Sequence[Tensor],
    scale: float,
    inner: Sequence[Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """Closed form for g_w(x) = x A'B': dB = scale * G'(XA'), dA = scale * (GB)'X.

    Several adapters that meet the same x (query and value) are one of the sum of their ranks, so
    that x, which is far larger than what is made of it, is read twice and not twice for each.

    Args:
        adapters: whose gradients to form.
        x: (N, D), the hidden input of all of them.
        gradients: G of each, (N, H), in the dtype of x.
        scale: alpha.
        inner: `inner_products`, if they have been formed.

    Returns:
        Of each adapter: `lora_a` (R, D) and `lora_b` (H, R), in the dtype of x.
    """
    g = [_scaled(gradient, scale) for gradient in gradients]
    back = [
        _few_by_long(adapter.lora_b.to(x.dtype).T, own)
        for own, adapter in zip(g, adapters, strict=True)
    ]
    a = torch.split_with_sizes(joined(back, dim=0) @ x, _ranks(adapters))
    u = inner_products(adapters, x) if inner is None else inner
    # The transpose of what is wanted reads G in the order in which it lies.
    return [
        {"lora_a": own_a, "lora_b": (own_u @ gradient).T}
        for own_a, own_u, gradient in zip(a, u, g, strict=True)
    ]


AdapterGradients = list[dict[str, Tensor]]
"""By name, of each adapter that meets one hidden input."""


def stacked_lowrank_gradients(
    adapters: Sequence[Sequence[LowRankAdapter]],
    inputs: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    scale: float,
) -> list[AdapterGradients]:
    """`lowrank_gradients` of P hidden inputs at once, where all shapes are equal.

    Few products of many matrices: on a GPU, launching small ones takes longer than they do.

    Args:
        adapters: M of each hidden input.
        inputs: P of (N, D).
        gradients: G of each adapter, (N, H), in the dtype of the inputs.
        scale: alpha.

    Returns:
        Of each input, of each adapter: `lora_a` (R, D) and `lora_b` (H, R), contiguous parts of two
        tensors, in the adapters' dtype.
    """
    g = torch.stack([part for own in gradients for part in own])  # (P M, N, H)
    return stacked_products(adapters, torch.stack(list(inputs)), g, scale)


def stacked_products(
    adapters: Sequence[Sequence[LowRankAdapter]], x: Tensor, g: Tensor, scale: float
) -> list[AdapterGradients]:
    """`stacked_lowrank_gradients` of data that is stacked: (P, N, D) and (P M, N, H)."""
    num, each = len(x), len(adapters[0])
    flat = [adapter for own in adapters for adapter in own]  # P M
    rank, master = len(flat[0].lora_a), flat[0].lora_a.dtype
    g = _scaled(g, scale)
    down = torch.stack([adapter.lora_a for adapter in flat]).to(x.dtype)  # (P M, R, D)
    up = torch.stack([adapter.lora_b for adapter in flat]).to(x.dtype)  # (P M, H, R)
    back = torch.bmm(g, up).view(num, each, -1, rank)  # (P, M, N, R)
    back = back.transpose(1, 2).flatten(2)  # (P, N, M R)
    a = torch.bmm(back.mT, x).view(num * each, rank, -1)
    u = torch.bmm(down.view(num, each * rank, -1), x.mT).view(num * each, rank, -1)  # (P M, R, N)
    b = torch.bmm(u, g).mT  # (P M, H, R)
    parts = zip(a.to(master).unbind(), b.to(master).contiguous().unbind(), strict=True)
    found = [{"lora_a": one, "lora_b": other} for one, other in parts]
    return [found[first : first + each] for first in range(0, len(found), each)]


def _few_by_long(few: Tensor, long: Tensor) -> Tensor:
    """Product of few rows (R, D) with long' for long (N, D), which is far larger: (R, N)."""
    if long.dtype is torch.bfloat16:  # a host's kernels for it are faster this way, others slower
        return few.contiguous() @ long.T
    return (long @ few.T).T


def _ranks(adapters: Sequence[LowRankAdapter]) -> list[int]:
    return [len(adapter.lora_a) for adapter in adapters]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts as one tensor; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


@torch.no_grad()
def adapter_gradients(adapter: Adapter, data: AdaptationData, scale: float) -> dict[str, Tensor]:
    """Gradient of the task loss by the adapter's parameters, by the cheapest exact route.

    Paper: Proposition 1. Arguments and return value as in `surrogate_gradients`.
    """
    if adapter.spec.kind is not SiteKind.conv2d:
        if isinstance(adapter, LinearAdapter):
            return linear_gradients(adapter, data, scale)
        if isinstance(adapter, LowRankAdapter):
            x, g = data.hidden_input, data.hidden_gradient
            return lowrank_gradients([adapter], x, [g], scale)[0]
    return surrogate_gradients(adapter, data, scale)


def _scaled(gradient: Tensor, scale: float) -> Tensor:
    # The usual alpha is 1, and the gradient may be as large as the base model's activations.
    return gradient if scale == 1.0 else scale * gradient
