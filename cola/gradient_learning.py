"""The paper's equations as pure functions: from (x, hidden gradient) to an adapter's gradient.

Symbols here and only here: x hidden input, g hidden gradient, w adapter parameters. Everything is
summed over rows, never averaged: the hidden gradient already carries the task loss's averaging.
"""

import torch
from torch import Tensor

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
        adapter: g_w with parameters that require gradients.
        data: x (N, D) and g (N, H), in the adapter's dtype and on its device.
        scale: alpha, the factor on the adapter's output, hence on its gradient.

    Returns:
        Gradient by parameter name, shapes of the parameters.
    """
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    with torch.enable_grad():
        loss = surrogate_loss(scale * adapter(data.hidden_input), data.hidden_gradient)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def linear_gradients(
    adapter: LinearAdapter, data: AdaptationData, scale: float
) -> dict[str, Tensor]:
    """Closed form for g_w(x) = x W' + b: dW = scale * G'X, db = scale * sum of G over rows."""
    g = _scaled(data.hidden_gradient, scale)  # (N, H)
    gradients = {"weight": g.T @ data.hidden_input}  # (H, D)
    if adapter.bias is not None:
        gradients["bias"] = g.sum(dim=0)  # (H,)
    return gradients


def lowrank_gradients(
    adapter: LowRankAdapter, data: AdaptationData, scale: float
) -> dict[str, Tensor]:
    """Closed form for g_w(x) = x A'B': dB = scale * G'(XA'), dA = scale * (GB)'X."""
    x, g = data.hidden_input, _scaled(data.hidden_gradient, scale)  # (N, D), (N, H)
    return {
        "lora_a": (g @ adapter.lora_b).T @ x,  # (R, D)
        "lora_b": g.T @ (x @ adapter.lora_a.T),  # (H, R)
    }


@torch.no_grad()
def adapter_gradients(adapter: Adapter, data: AdaptationData, scale: float) -> dict[str, Tensor]:
    """Gradient of the task loss by the adapter's parameters, by the cheapest exact route.

    Paper: Proposition 1. Arguments and return value as in `surrogate_gradients`.
    """
    if adapter.spec.kind is not SiteKind.conv2d:
        if isinstance(adapter, LinearAdapter):
            return linear_gradients(adapter, data, scale)
        if isinstance(adapter, LowRankAdapter):
            return lowrank_gradients(adapter, data, scale)
    return surrogate_gradients(adapter, data, scale)


def _scaled(gradient: Tensor, scale: float) -> Tensor:
    # The usual alpha is 1, and the gradient may be as large as the base model's activations.
    return gradient if scale == 1.0 else scale * gradient
