"""Adapters of one cohort at one site, stacked: users of one structure, in one batched product.

Small adapters (low-rank, MLP) meet their users' rows in batched products, whatever the number of
users; a linear adapter is as large as its layer, where a copy for a batched product would cost more
than a loop over the few users that fit in memory.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from cola.adapters import (
    Adapter,
    LinearAdapter,
    LowRankAdapter,
    MLPAdapter,
    install_parameters,
    skeleton,
)
from cola.runtime import upload
from cola.sites import SiteKind
from cola.user_rows import Tiles, UserRows


class UserStack(nn.Module):
    """Adapters of one cohort at one site.

    Ranks that differ are filled up with zeros to the largest: a zero row of A and a zero column of
    B add nothing and receive no gradient, under any optimizer here.

    Attributes:
        first: position of the cohort's first user in the run's order.
        num_users: K of the cohort.
        num_parameters: of all of them, each of its own rank.
        has_unit_alphas: whether no output has to be scaled.
        adapter: structure of one adapter, its parameters stacked: (K, ...) each.
    """

    def __init__(self, members: Sequence[Adapter], *, first: int, alphas: Sequence[float]) -> None:
        super().__init__()
        self.first, self.num_users = first, len(members)
        self._alphas = tuple(alphas)
        self._alphas_by: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.has_unit_alphas = set(alphas) == {1.0}
        self.num_parameters = sum(p.numel() for member in members for p in member.parameters())
        self._ranks = [m.lora_a.shape[0] for m in members if isinstance(m, LowRankAdapter)]
        self.adapter = copy.deepcopy(members[0])
        for name, _ in members[0].named_parameters():
            parts = [self._filled(name, member.get_parameter(name).detach()) for member in members]
            owner, _, leaf = name.rpartition(".")
            stacked = nn.Parameter(torch.stack(parts), requires_grad=False)
            setattr(self.adapter.get_submodule(owner), leaf, stacked)

    @property
    def last(self) -> int:
        """Position behind the cohort's last user."""
        return self.first + self.num_users

    @property
    def is_linear(self) -> bool:
        """Whether its adapters can be merged (Proposition 2)."""
        return not isinstance(self.adapter, MLPAdapter)

    def parameter_stacks(self) -> dict[str, nn.Parameter]:
        """(K, ...) by the name that a single adapter's parameter has."""
        return dict(self.adapter.named_parameters())

    def alphas(self, like: Tensor) -> Tensor:
        """(K,) scales of the users' outputs, on the device and in the dtype of a tensor."""
        key = (like.device, like.dtype)
        if key not in self._alphas_by:
            self._alphas_by[key] = upload(torch.tensor(self._alphas, dtype=like.dtype), like.device)
        return self._alphas_by[key]

    def single(self, user: int) -> Adapter:
        """One user's adapter, its parameters views of the stacks; as wide as the stacks are."""
        adapter = skeleton(self.adapter)
        install_parameters(adapter, {name: p[user] for name, p in self.parameter_stacks().items()})
        return adapter.requires_grad_(True)

    def forward(self, x: Tensor, rows: UserRows) -> Tensor:
        """alpha_k g_k(x) of every row's user.

        Args:
            x: (N, ..., D) or (N, D, h, w), rows grouped by user.
            rows: whose they are; positions count from the cohort's first user.
        """
        if self.adapter.spec.kind is SiteKind.conv2d:
            return torch.cat(
                [self._scaled(self._member_output(x[s], k), k) for k, s in rows.slices()]
            )
        flat = x.reshape(-1, x.shape[-1])
        spread = rows.spread(len(flat))
        assert spread is not None
        tiles = spread.tiles(self.num_users, x.device)
        if isinstance(self.adapter, LinearAdapter) and tiles.users is not None:
            parts = [self._scaled(self._member_output(flat[s], k), k) for k, s in spread.slices()]
            output = torch.cat(parts)
        else:
            output = tiles.join(self._scaled_tiles(self.tile_output(tiles.cut(flat), tiles), tiles))
        return output.reshape(*x.shape[:-1], -1)

    def tile_output(self, x: Tensor, tiles: Tiles) -> Tensor:
        """What every tile's own adapter answers, not scaled: (S, c, D) to (S, c, H)."""
        adapter = self.adapter
        if isinstance(adapter, LowRankAdapter):
            a, b = tiles.pick(adapter.lora_a), tiles.pick(adapter.lora_b)
            return torch.bmm(torch.bmm(x, a.mT), b.mT)
        if isinstance(adapter, LinearAdapter):
            return _affine(x, adapter.weight, adapter.bias, tiles)
        for layer in adapter.layers[:-1]:
            x = functional.relu(_layer(x, layer, tiles))
        return _layer(x, adapter.layers[-1], tiles)

    def factors_in_place(
        self, rows: UserRows, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A (S, R, D), B (S, H, R) and alphas (S, 1, 1) of S equal parts of rows; None: uneven.

        Alphas are None where all of them are 1.
        """
        if not isinstance(self.adapter, LowRankAdapter):
            return None
        tiles = rows.tiles(self.num_users, x.device)
        if tiles.index is not None:
            return None
        alphas = None if self.has_unit_alphas else tiles.pick(self.alphas(x))[:, None, None]
        return tiles.pick(self.adapter.lora_a), tiles.pick(self.adapter.lora_b), alphas

    @torch.no_grad()
    def delta_weight(self, shares: Tensor) -> Tensor:
        """Sum of share_k delta W_k over the cohort, (H, D) or (H, D, kh, kw).

        For low-rank users one product of rank K R.
        """
        adapter = self.adapter
        factors = self.delta_factors(shares)
        if factors is not None:
            assert isinstance(adapter, LowRankAdapter)
            b, a = factors
            return (b @ a).reshape(-1, *adapter.lora_a.shape[2:])
        assert isinstance(adapter, LinearAdapter)
        total: Tensor = torch.tensordot(shares.to(adapter.weight), adapter.weight, dims=1)
        return total

    @torch.no_grad()
    def delta_factors(self, shares: Tensor) -> tuple[Tensor, Tensor] | None:
        """(H, K R) and (K R, D) or (K R, D * kh * kw), whose product is the delta weight.

        Shares are part of the first. None for other adapters than low-rank ones.
        """
        adapter = self.adapter
        if not isinstance(adapter, LowRankAdapter):
            return None
        b = adapter.lora_b.flatten(2) * shares.to(adapter.lora_b)[:, None, None]  # (K, H, R)
        return b.transpose(0, 1).flatten(1), adapter.lora_a.flatten(2).flatten(0, 1)

    def delta_bias(self, shares: Tensor) -> Tensor | None:
        """Sum of share_k delta b_k, (H,); None where adapters have no bias."""
        bias = self.adapter.bias if isinstance(self.adapter, LinearAdapter) else None
        return None if bias is None else shares.to(bias) @ bias

    def member_state(self, user: int) -> dict[str, Tensor]:
        """Copies of one user's parameters, of its own rank."""
        return {
            name: self._own_rank(name, stack[user].detach(), user).clone()
            for name, stack in self.parameter_stacks().items()
        }

    @torch.no_grad()
    def load_member(self, user: int, state: Mapping[str, Tensor]) -> None:
        """Gives one user other parameters."""
        for name, stack in self.parameter_stacks().items():
            self._own_rank(name, stack[user], user).copy_(state[name])

    def own_parts(self, user: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views of one user's part of stacked tensors, without what fills its rank up."""
        return {name: self._own_rank(name, stack[user], user) for name, stack in tensors.items()}

    def _filled(self, name: str, tensor: Tensor) -> Tensor:
        """A low-rank parameter with zeros up to the largest rank."""
        if not self._ranks:
            return tensor
        axis = 0 if name == "lora_a" else 1
        shape = list(tensor.shape)
        shape[axis] = max(self._ranks) - shape[axis]
        return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)

    def _own_rank(self, name: str, tensor: Tensor, user: int) -> Tensor:
        if not self._ranks:
            return tensor
        return tensor.narrow(0 if name == "lora_a" else 1, 0, self._ranks[user])

    def _member_output(self, x: Tensor, user: int) -> Tensor:
        own = {name: stack[user] for name, stack in self.parameter_stacks().items()}
        output: Tensor = functional_call(self.adapter, own, (x,))
        return output

    def _scaled(self, output: Tensor, user: int) -> Tensor:
        alpha = self._alphas[user]
        return output if alpha == 1.0 else alpha * output

    def _scaled_tiles(self, output: Tensor, tiles: Tiles) -> Tensor:
        if self.has_unit_alphas:
            return output
        return output * tiles.pick(self.alphas(output))[:, None, None]


def _layer(x: Tensor, layer: nn.Module, tiles: Tiles) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return _affine(x, layer.weight, layer.bias, tiles)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Product with the transposed weight, plus the bias, by tile: (S, c, D) to (S, c, H)."""
    product = torch.bmm(x, tiles.pick(weight).mT)
    return product if bias is None else product + tiles.pick(bias)[:, None]
