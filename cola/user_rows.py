"""Whose rows: the rows of a batch lie user by user, so that routing needs no search and no copy.

Rows are grouped once per batch, before the base model runs. Whatever a site makes of a batch (B, T
tokens, beams of a generation), its leading axis keeps that order, and a user's part stays a slice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from urllib.parse import quote

import torch
from torch import Tensor

from cola.runtime import upload

UserId = str
"""Name of a user, index k in the paper. The owner of everything is called `EVERYONE`."""

EVERYONE: UserId = ""
"""Owner of the adapters where users do not have their own (users=one and joint)."""


def user_folder(user: UserId) -> str:
    """Name of a user's folder, whatever the user's own name holds."""
    return quote(user, safe=" ")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows of several users as one tensor with an axis of equal parts, for batched products.

    Every tile holds rows of one user only; what is missing to its size is filled with a row of the
    same user, so that nobody's values can reach another's product.

    Attributes:
        size: rows of a tile, c.
        users: (S,) position of each tile's user; None if tile i is user i of all users.
        index: (S, c) rows; None if rows are in place already, so that a tile is a view.
        is_filler: (S, c); None without any.
        inverse: (N,) where each row went in the flattened tiles; None if in place.
    """

    size: int
    users: Tensor | None
    index: Tensor | None
    is_filler: Tensor | None
    inverse: Tensor | None

    def cut(self, rows: Tensor, *, fill: float | None = None) -> Tensor:
        """(N, D) to (S, c, D); filler rows become `fill` where one is given."""
        if self.index is None:
            return rows.view(-1, self.size, *rows.shape[1:])
        tiles = rows.index_select(0, self.index.flatten()).view(*self.index.shape, *rows.shape[1:])
        if fill is not None and self.is_filler is not None:
            tiles = tiles.masked_fill(self.is_filler[..., None], fill)
        return tiles

    def join(self, tiles: Tensor) -> Tensor:
        """(S, c, H) back to (N, H), without fillers."""
        flat = tiles.flatten(0, 1)
        return flat if self.inverse is None else flat.index_select(0, self.inverse)

    def pick(self, stacked: Tensor) -> Tensor:
        """(K, ...) parameters of all users to (S, ...) of the tiles' users."""
        return stacked if self.users is None else stacked[self.users]

    def add_up(self, per_tile: Tensor, num_users: int) -> Tensor:
        """(S, ...) summed over the tiles of each user, (K, ...); zero for absent users."""
        if self.users is None:
            return per_tile
        total = per_tile.new_zeros(num_users, *per_tile.shape[1:])
        return total.index_add_(0, self.users, per_tile)


@dataclass(frozen=True, kw_only=True)
class UserRows:
    """Rows of the users of one batch, grouped.

    Attributes:
        users: positions in the run's list of users, ascending; only those with rows.
        counts: rows of each, >= 1.
    """

    users: tuple[int, ...]
    counts: tuple[int, ...]
    _tiles: dict[tuple[int, torch.device], Tiles] = field(
        default_factory=dict, repr=False, compare=False
    )
    _parts: dict[tuple[int, int], "UserRows"] = field(
        default_factory=dict, repr=False, compare=False
    )
    _scaled: dict[int, "UserRows"] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, owners: Sequence[int]) -> "UserRows":
        """From the position of each row's user, ascending."""
        groups = [(owner, len(list(rows))) for owner, rows in groupby(owners)]
        users, counts = tuple(zip(*groups, strict=True)) or ((), ())
        assert all(a < b for a, b in pairwise(users)), "rows are not grouped by user"
        return cls(users=users, counts=counts)

    @property
    def total(self) -> int:
        """Rows of all users, B."""
        return sum(self.counts)

    @cached_property
    def bounds(self) -> list[int]:
        """Where each user's rows begin, and the end of the last, in the order of `users`."""
        return [0, *accumulate(self.counts)]

    def spread(self, num_rows: int) -> "UserRows | None":
        """The same users where every row of the batch became several; None if that cannot be.

        Args:
            num_rows: N, of a tensor that a site made of the batch: tokens, or beams.
        """
        factor, rest = divmod(num_rows, max(self.total, 1))
        if rest or (factor == 0 and self.total):
            return None
        if factor == 1:
            return self
        if factor not in self._scaled:
            counts = tuple(count * factor for count in self.counts)
            self._scaled[factor] = UserRows(users=self.users, counts=counts)
        return self._scaled[factor]

    def part(self, first: int, last: int) -> tuple[slice, "UserRows"]:
        """Rows of the users first <= position < last, who count from `first` there."""
        inside = [i for i, user in enumerate(self.users) if first <= user < last]
        start, end = (inside[0], inside[-1] + 1) if inside else (0, 0)
        where = slice(self.bounds[start], self.bounds[end])
        if (first, last) not in self._parts:
            self._parts[first, last] = UserRows(
                users=tuple(user - first for user in self.users[start:end]),
                counts=self.counts[start:end],
            )
        return where, self._parts[first, last]

    def slices(self) -> list[tuple[int, slice]]:
        """Each user's position and rows."""
        pairs = zip(self.bounds[:-1], self.bounds[1:], strict=True)
        return [(user, slice(*pair)) for user, pair in zip(self.users, pairs, strict=True)]

    def without(self, users: frozenset[int]) -> "tuple[list[int], UserRows]":
        """Rows that remain when some users take no part, and whose they are."""
        kept = [(user, where) for user, where in self.slices() if user not in users]
        rows = [row for _, where in kept for row in range(where.start, where.stop)]
        counts = tuple(where.stop - where.start for _, where in kept)
        return rows, UserRows(users=tuple(user for user, _ in kept), counts=counts)

    def tiles(self, num_users: int, device: torch.device) -> Tiles:
        """Equal parts for batched products, at most twice as many rows plus one per tile.

        A tile is as large as a user's mean number of rows: a user with more has several.

        Args:
            num_users: K, how many the stacked parameters have.
            device: where products run.
        """
        key = (num_users, device)
        if key not in self._tiles:
            self._tiles[key] = self._cut(num_users, device)
        return self._tiles[key]

    def _cut(self, num_users: int, device: torch.device) -> Tiles:
        size = math.ceil(self.total / len(self.users))
        is_complete = self.users == tuple(range(num_users))
        if len(set(self.counts)) == 1:  # every user has one full tile, where it lies
            users = None if is_complete else upload(torch.tensor(self.users), device)
            return Tiles(size=size, users=users, index=None, is_filler=None, inverse=None)
        counts = torch.tensor(self.counts)  # (P,) users that are present
        num_tiles = (counts + size - 1) // size
        begin = torch.cumsum(counts, 0) - counts
        owner = torch.repeat_interleave(torch.arange(len(counts)), num_tiles)  # (S,)
        number = torch.arange(len(owner)) - (torch.cumsum(num_tiles, 0) - num_tiles)[owner]
        offset = number[:, None] * size + torch.arange(size)  # (S, c) among the user's own rows
        is_filler = offset >= counts[owner, None]
        index = begin[owner, None] + offset.minimum(counts[owner, None] - 1)
        inverse = torch.empty(self.total, dtype=torch.long)
        inverse[index[~is_filler]] = torch.arange(index.numel()).view_as(index)[~is_filler]
        in_place = is_complete and len(owner) == num_users
        return Tiles(
            size=size,
            users=None if in_place else upload(torch.tensor(self.users)[owner], device),
            index=upload(index, device),
            is_filler=upload(is_filler, device),
            inverse=upload(inverse, device),
        )
