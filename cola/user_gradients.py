"""Gradients of many users' adapters from the adaptation data of one batch.

The equations are those of `gradient_learning`, with a leading axis of users. Symbols as there: x
hidden input, g hidden gradient. A user's gradient comes from the user's own rows alone; `shared`
ones come from all rows (the exact gradient of a merged objective).
"""

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.adapters import LinearAdapter, LowRankAdapter, MLPAdapter
from cola.gradient_learning import adapter_gradients, surrogate_loss
from cola.sites import SiteKind
from cola.user_rows import UserRows
from cola.user_stack import UserStack

LONG = 1 << 13
"""Numbers of a user's hidden inputs, on average, from which a host makes products user by user."""


@torch.no_grad()
def user_gradients(stack: UserStack, data: AdaptationData, rows: UserRows) -> dict[str, Tensor]:
    """Each user's gradient from its own rows. Paper: Algorithm 1, lines 10 to 14.

    Args:
        stack: one cohort's adapters.
        data: x (N, D) and g (N, H) of the cohort's users, grouped by user; products are formed in
            their dtype.
        rows: whose they are; N in all.

    Returns:
        By parameter name, (K, ...); zero for users without rows.
    """
    adapter, x, g = stack.adapter, data.hidden_input, data.hidden_gradient
    if adapter.spec.kind is SiteKind.conv2d:
        return _member_gradients(stack, data, rows)
    tiles = rows.tiles(stack.num_users, x.device)
    on_host = x.device.type == "cpu"
    # Tiles that are not one of each user in order have copies of their users' parameters.
    is_large = isinstance(adapter, LinearAdapter) or (on_host and isinstance(adapter, MLPAdapter))
    if is_large and tiles.users is not None:
        return _member_gradients(stack, data, rows)
    # Others are copies of rows, which on a host take longer than a product for each user.
    is_long = on_host and x.numel() >= LONG * len(rows.users)
    if is_long and tiles.index is not None and isinstance(adapter, LowRankAdapter):
        return _lowrank_gradients(stack, adapter, data, rows)
    # A filler row repeats a row of the same user; without a gradient it teaches nothing.
    x, g = tiles.cut(x), tiles.cut(g, fill=0.0)  # (S, c, D), (S, c, H)
    master = next(stack.parameters()).dtype
    if not isinstance(adapter, LowRankAdapter | LinearAdapter):
        return _surrogate_gradients(stack, x.to(master), g.to(master), rows)
    g = _scaled(g, tiles.pick(stack.alphas(g))[:, None, None], stack)
    if isinstance(adapter, LowRankAdapter):
        a, b = (tiles.pick(p).to(x.dtype) for p in (adapter.lora_a, adapter.lora_b))
        per_tile = {
            "lora_a": torch.bmm(torch.bmm(g, b).mT, x),  # (S, R, D)
            # The transpose of what is wanted reads g in the order in which it lies.
            "lora_b": torch.bmm(torch.bmm(x, a.mT).mT, g).mT,  # (S, H, R)
        }
    else:
        per_tile = {"weight": torch.bmm(g.mT, x)}
        if adapter.bias is not None:
            per_tile["bias"] = g.sum(dim=1)
    # Products are formed in the data's dtype, sums over tiles in the parameters'.
    return {
        name: tiles.add_up(part.to(master).contiguous(), stack.num_users)
        for name, part in per_tile.items()
    }


@torch.no_grad()
def shared_gradients(stack: UserStack, data: AdaptationData, shares: Tensor) -> dict[str, Tensor]:
    """The gradient of the merged objective: all rows teach every user, by its share in the merge.

    Args:
        stack: one cohort's adapters, linear in x.
        data: x (N, D) and g (N, H) of all rows.
        shares: (K,) factor of each user's delta weight.

    Returns:
        By parameter name, (K, ...).
    """
    adapter, x, g = stack.adapter, data.hidden_input, data.hidden_gradient
    shares = shares.to(next(stack.parameters()))
    if isinstance(adapter, LowRankAdapter) and adapter.spec.kind is not SiteKind.conv2d:
        a, b = adapter.lora_a.to(x.dtype), adapter.lora_b.to(x.dtype)  # (K, R, D), (K, H, R)
        wide_b = b.transpose(0, 1).flatten(1)  # (H, K R): all users as one adapter of that rank
        grad_a = ((g @ wide_b).T @ x).view_as(a)
        grad_b = (g.T @ (x @ a.flatten(0, 1).T)).view(-1, *b.shape[::2]).transpose(0, 1)
        gradients = {"lora_a": grad_a, "lora_b": grad_b}
    elif isinstance(adapter, LinearAdapter):
        single = adapter_gradients(stack.single(0), data, 1.0)  # does not depend on the adapter
        gradients = {
            name: part.expand(stack.num_users, *part.shape) for name, part in single.items()
        }
    else:
        each = [adapter_gradients(stack.single(user), data, 1.0) for user in range(stack.num_users)]
        gradients = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    return {name: shares.view(-1, *[1] * (p.dim() - 1)) * p for name, p in gradients.items()}


def _lowrank_gradients(
    stack: UserStack, adapter: LowRankAdapter, data: AdaptationData, rows: UserRows
) -> dict[str, Tensor]:
    """`lowrank_gradients`, user by user, where the rows lie."""
    x, g = data.hidden_input, data.hidden_gradient
    a, b = adapter.lora_a.to(x.dtype), adapter.lora_b.to(x.dtype)  # (K, R, D), (K, H, R)
    grad_a, grad_b = torch.zeros_like(adapter.lora_a), torch.zeros_like(adapter.lora_b)
    for user, where in rows.slices():
        own_x, own_g = x[where], g[where]
        grad_a[user] = (own_g @ b[user]).T @ own_x
        grad_b[user] = ((own_x @ a[user].T).T @ own_g).T
    if not stack.has_unit_alphas:
        alphas = stack.alphas(grad_a)[:, None, None]
        grad_a, grad_b = grad_a * alphas, grad_b * alphas
    return {"lora_a": grad_a, "lora_b": grad_b}


def _member_gradients(stack: UserStack, data: AdaptationData, rows: UserRows) -> dict[str, Tensor]:
    """User by user, for sites and adapters whose products cannot be batched."""
    total = {name: torch.zeros_like(p) for name, p in stack.parameter_stacks().items()}
    alphas = stack.alphas(data.hidden_input).tolist()
    for user, where in rows.slices():
        own = AdaptationData(
            hidden_input=data.hidden_input[where], hidden_gradient=data.hidden_gradient[where]
        )
        for name, part in adapter_gradients(stack.single(user), own, alphas[user]).items():
            total[name][user] = part
    return total


def _surrogate_gradients(
    stack: UserStack, x: Tensor, g: Tensor, rows: UserRows
) -> dict[str, Tensor]:
    """Eq. (6) over tiles, for adapters that are not linear: (S, c, D) and (S, c, H)."""
    tiles = rows.tiles(stack.num_users, x.device)
    names, parameters = zip(*stack.parameter_stacks().items(), strict=True)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        output = stack.tile_output(x, tiles)
        scaled = _scaled(output, tiles.pick(stack.alphas(output))[:, None, None], stack)
        loss = surrogate_loss(scaled, g)
    gradients = torch.autograd.grad(loss, parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return dict(zip(names, gradients, strict=True))


def _scaled(values: Tensor, alphas: Tensor, stack: UserStack) -> Tensor:
    return values if stack.has_unit_alphas else values * alphas
