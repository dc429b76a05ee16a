"""Gradients of many users' adapters from the adaptation data of one batch.

The equations are those of `gradient_learning`, with a leading axis of users. Symbols as there: x
hidden input, g hidden gradient. A user's gradient comes from the user's own rows alone; `shared`
ones come from all rows (the exact gradient of a merged objective).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.adapters import LinearAdapter, LowRankAdapter
from cola.gradient_learning import adapter_gradients, joined, surrogate_loss
from cola.sites import SiteKind
from cola.user_rows import Tiles, UserRows
from cola.user_stack import UserStack

LONG = 1 << 13
"""Numbers of a user's hidden inputs, on average, from which a host makes products user by user."""


@torch.no_grad()
def user_gradients(
    stacks: Sequence[UserStack], x: Tensor, gradients: Sequence[Tensor], rows: UserRows
) -> list[dict[str, Tensor]]:
    """Each user's gradient from its own rows, at sites that share a hidden input (query, value).

    Paper: Algorithm 1, lines 10 to 14. Low-rank adapters are fitted as one of the sum of their
    ranks, so that x is read twice and not twice for each site.

    Args:
        stacks: one cohort's adapters at each site.
        x: (N, D), hidden input of the cohort's users, grouped by user; products are formed in its
            dtype.
        gradients: G of each site, (N, H), in that dtype.
        rows: whose they are; N in all.

    Returns:
        Of each site, by parameter name, (K, ...); zero for users without rows.
    """
    lowrank = [stack.adapter for stack in stacks if isinstance(stack.adapter, LowRankAdapter)]
    is_plain = all(adapter.spec.kind is not SiteKind.conv2d for adapter in lowrank)
    if len(lowrank) == len(stacks) and is_plain:
        return _lowrank_gradients(stacks, lowrank, x, gradients, rows)
    if len(stacks) > 1:
        return [
            user_gradients([s], x, [g], rows)[0] for s, g in zip(stacks, gradients, strict=True)
        ]
    data = AdaptationData(hidden_input=x, hidden_gradient=gradients[0])
    return [_site_gradients(stacks[0], data, rows)]


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
    stacks: Sequence[UserStack],
    adapters: Sequence[LowRankAdapter],
    x: Tensor,
    gradients: Sequence[Tensor],
    rows: UserRows,
) -> list[dict[str, Tensor]]:
    """`lowrank_gradients` with an axis of users, in batched products or user by user."""
    stack, master = stacks[0], adapters[0].lora_a.dtype
    tiles = rows.tiles(stack.num_users, x.device)
    # Tiles that are not in place are copies of rows, which on a host take longer than a product for
    # each user.
    is_long = x.device.type == "cpu" and x.numel() >= LONG * len(rows.users)
    if is_long and tiles.index is not None:
        return _lowrank_gradients_by_user(stack, adapters, x, gradients, rows)
    # A filler row repeats a row of the same user; without a gradient it teaches nothing.
    x, g = tiles.cut(x), [tiles.cut(own, fill=0.0) for own in gradients]  # (S, c, D), (S, c, H)
    a = joined([tiles.pick(adapter.lora_a).to(x.dtype) for adapter in adapters], dim=1)
    b = [tiles.pick(adapter.lora_b).to(x.dtype) for adapter in adapters]
    inner = torch.bmm(x, a.mT)  # (S, c, M R)
    back = joined([torch.bmm(own, up) for own, up in zip(g, b, strict=True)], dim=2)
    if not stack.has_unit_alphas:
        alphas = tiles.pick(stack.alphas(x))[:, None, None]
        inner, back = inner * alphas, back * alphas
    ranks = [adapter.lora_a.shape[1] for adapter in adapters]
    grad_a = torch.bmm(back.mT, x).split_with_sizes(ranks, dim=1)  # (S, R, D)
    # The transpose of what is wanted reads g in the order in which it lies.
    parts = zip(inner.split_with_sizes(ranks, dim=2), g, strict=True)
    grad_b = [torch.bmm(own.mT, gradient).mT for own, gradient in parts]  # (S, H, R)

    def summed(per_tile: Tensor) -> Tensor:
        # Products are formed in the data's dtype, sums over tiles in the parameters'.
        return tiles.add_up(per_tile.contiguous().to(master), stack.num_users)

    return [
        {"lora_a": summed(own_a), "lora_b": summed(own_b)}
        for own_a, own_b in zip(grad_a, grad_b, strict=True)
    ]


def _lowrank_gradients_by_user(
    stack: UserStack,
    adapters: Sequence[LowRankAdapter],
    x: Tensor,
    gradients: Sequence[Tensor],
    rows: UserRows,
) -> list[dict[str, Tensor]]:
    """The same, user by user, where the rows lie."""
    a = joined([adapter.lora_a for adapter in adapters], dim=1).to(x.dtype)  # (K, M R, D)
    b = [adapter.lora_b.to(x.dtype) for adapter in adapters]  # (K, H, R)
    ranks = [adapter.lora_a.shape[1] for adapter in adapters]
    grad_a = torch.zeros(a.shape, dtype=adapters[0].lora_a.dtype, device=x.device)
    grad_b = [torch.zeros_like(adapter.lora_b) for adapter in adapters]
    for user, where in rows.slices():
        own_x, own_g = x[where], [gradient[where] for gradient in gradients]
        back = joined([g @ up[user] for g, up in zip(own_g, b, strict=True)], dim=1)
        grad_a[user] = back.T @ own_x
        inner = (own_x @ a[user].T).split_with_sizes(ranks, dim=1)
        for total, one, g in zip(grad_b, inner, own_g, strict=True):
            total[user] = (one.T @ g).T
    if not stack.has_unit_alphas:
        alphas = stack.alphas(grad_a)[:, None, None]
        grad_a, grad_b = grad_a * alphas, [own * alphas for own in grad_b]
    parts = (own.contiguous() for own in grad_a.split_with_sizes(ranks, dim=1))
    return [{"lora_a": one, "lora_b": other} for one, other in zip(parts, grad_b, strict=True)]


def _site_gradients(stack: UserStack, data: AdaptationData, rows: UserRows) -> dict[str, Tensor]:
    """Of one site whose adapters are not low-rank, or whose products cannot be batched."""
    adapter, x, g = stack.adapter, data.hidden_input, data.hidden_gradient
    if adapter.spec.kind is SiteKind.conv2d:
        return _member_gradients(stack, data, rows)
    tiles = rows.tiles(stack.num_users, x.device)
    on_host = x.device.type == "cpu"
    # Tiles that are not one of each user in order have copies of their users' parameters.
    is_large = isinstance(adapter, LinearAdapter) or on_host
    if is_large and tiles.users is not None:
        return _member_gradients(stack, data, rows)
    x, g = tiles.cut(x), tiles.cut(g, fill=0.0)
    master = next(stack.parameters()).dtype
    if not isinstance(adapter, LinearAdapter):
        return _surrogate_gradients(stack, x.to(master), g.to(master), rows)
    g = _scaled(g, stack, tiles)
    per_tile = {"weight": torch.bmm(g.mT, x)}
    if adapter.bias is not None:
        per_tile["bias"] = g.sum(dim=1)
    return {
        name: tiles.add_up(part.to(master).contiguous(), stack.num_users)
        for name, part in per_tile.items()
    }


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
        loss = surrogate_loss(_scaled(output, stack, tiles), g)
    gradients = torch.autograd.grad(loss, parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return dict(zip(names, gradients, strict=True))


def _scaled(values: Tensor, stack: UserStack, tiles: Tiles) -> Tensor:
    """(S, c, H) times each tile's alpha."""
    if stack.has_unit_alphas:
        return values
    return values * tiles.pick(stack.alphas(values))[:, None, None]
