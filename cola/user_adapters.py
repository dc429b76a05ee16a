"""Adapters of all users at one site: each row by its user's, all of them reduced for a merge.

Stands in the place of a single adapter: beside the site, in a merge, and where it is fitted.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cola.adapters import (
    Adapter,
    MergeableAdapter,
    build_adapter,
    require_mergeable,
)
from cola.config.schema import AdapterConfig
from cola.config.user_settings import UserSettings
from cola.errors import MergeError, SiteError
from cola.roster import Roster
from cola.sites import SiteName, SiteSpec
from cola.user_rows import UserRows
from cola.user_stack import UserStack


class UserAdapters(nn.Module):
    """All users' adapters of one site, in the place of a single adapter.

    Attributes:
        spec: of the site.
        roster: says whose rows are passing, and who counts in a merge.
    """

    def __init__(self, spec: SiteSpec, stacks: Sequence[UserStack], roster: Roster) -> None:
        super().__init__()
        self.spec = spec
        self.roster = roster
        self._stacks = nn.ModuleList(stacks)

    @property
    def stacks(self) -> list[UserStack]:
        """By cohort, in the order of users."""
        return [stack for stack in self._stacks if isinstance(stack, UserStack)]

    @property
    def is_linear(self) -> bool:
        """Whether all of them can be merged."""
        return all(stack.is_linear for stack in self.stacks)

    def forward(self, x: Tensor) -> Tensor:
        """alpha_k g_k(x), each row by its own user's adapter; scaled, unlike a single adapter.

        Raises:
            SiteError: the site does not keep the rows of a batch apart.
        """
        rows = require_rows(self.roster.rows, len(x), self.spec.name)
        parts = [stack(x[where], own) for stack, (where, own) in self._parts(rows) if own.users]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def stacked_factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Factors of the users whose rows these are, if they are equal parts of low-rank users.

        Args:
            x: (..., D), hidden input of the rows under way.

        Returns:
            A (S, R, D), B (S, H, R) and, where they are not 1, alphas (S, 1, 1); None: rows have to
            be moved, or are of several cohorts.
        """
        if len(self._stacks) > 1:
            return None
        (stack,) = self.stacks
        rows = require_rows(self.roster.rows, len(x), self.spec.name)
        return stack.factors_in_place(rows, x)

    def delta_weight(self) -> Tensor:
        """What all users that take part mean for the base weight, alphas and 1/K included."""
        return self._reduced(lambda stack, shares: stack.delta_weight(shares))

    def delta_factors(self) -> tuple[Tensor, Tensor] | None:
        """(H, S) and (S, D) or (S, D * kh * kw), whose product is the delta weight.

        S is the sum of all users' ranks, each filled up to its cohort's largest. None if a user's
        adapter is not a low-rank one.
        """
        found = [stack.delta_factors(self._shares(stack)) for stack in self.stacks]
        factors = [pair for pair in found if pair is not None]
        if len(factors) < len(found):
            return None
        b, a = zip(*factors, strict=True)
        return torch.cat(b, dim=1), torch.cat(a)

    def delta_bias(self) -> Tensor | None:
        """The same for the bias, (H,), or None."""
        if all(stack.delta_bias(self._shares(stack)) is None for stack in self.stacks):
            return None
        return self._reduced(lambda stack, shares: stack.delta_bias(shares))

    def stack_of(self, user: int) -> tuple[UserStack, int]:
        """A user's cohort, and its place there."""
        stack = next(stack for stack in self.stacks if stack.first <= user < stack.last)
        return stack, user - stack.first

    def member(self, user: int, seed: int = 0) -> Adapter:
        """A copy of one user's adapter as a single one."""
        stack, place = self.stack_of(user)
        single = build_adapter(_config_of(self.roster.settings[user]), self.spec, seed=seed)
        state = stack.member_state(place)
        first = next(iter(state.values()))
        single.to(first.device, first.dtype).load_state_dict(state)
        return single

    def _parts(self, rows: UserRows) -> Iterator[tuple[UserStack, tuple[slice, UserRows]]]:
        return ((stack, rows.part(stack.first, stack.last)) for stack in self.stacks)

    def _shares(self, stack: UserStack) -> Tensor:
        return self.roster.shares()[stack.first : stack.last]

    def _reduced(self, reduce: Callable[[UserStack, Tensor], Tensor | None]) -> Tensor:
        deltas = (reduce(stack, self._shares(stack)) for stack in self.stacks)
        return functools.reduce(torch.add, [delta for delta in deltas if delta is not None])


SiteAdapter = Adapter | UserAdapters
"""What a site has: one adapter, or one for every user."""


def require_linear(adapter: SiteAdapter) -> MergeableAdapter | UserAdapters:
    """The adapter, or those of all users, if they can be merged (Proposition 2).

    Raises:
        MergeError: they cannot.
    """
    if not isinstance(adapter, UserAdapters):
        return require_mergeable(adapter)
    for stack in adapter.stacks:
        if not stack.is_linear:
            names = ", ".join(adapter.roster.names[stack.first : stack.last])
            raise MergeError(
                f"users {names} have mlp adapters at site {adapter.spec.name!r}, which are not "
                "linear in their input and cannot be merged into a weight: give them kind lowrank "
                "or linear, or use evaluation.merge=unmerged"
            )
    return adapter


def num_parameters(adapter: SiteAdapter) -> int:
    """Trainable parameters, without what fills ranks up."""
    if not isinstance(adapter, UserAdapters):
        return sum(parameter.numel() for parameter in adapter.parameters())
    return sum(stack.num_parameters for stack in adapter.stacks)


def require_rows(rows: UserRows | None, num_rows: int, site: SiteName) -> UserRows:
    """Whose the rows of a site's tensor are.

    Raises:
        SiteError: they cannot be told apart.
    """
    spread = None if rows is None else rows.spread(num_rows)
    if spread is None:
        given = "no rows were announced" if rows is None else f"the batch has {rows.total} rows"
        raise SiteError(
            f"site {site!r} works on {num_rows} rows and {given}, so that users cannot be told "
            "apart there: leave the site out of model.sites, or use users=joint"
        )
    return spread


def build_user_adapters(spec: SiteSpec, roster: Roster, *, seed: int) -> UserAdapters:
    """Fresh adapters of all users at one site, in float32."""
    stacks = []
    for cohort in roster.cohorts():
        users = roster.settings[cohort.first : cohort.last]
        members = [build_adapter(_config_of(u), spec, seed=seed, user=u.name) for u in users]
        alphas = [user.alpha for user in users]
        stacks.append(UserStack(members, first=cohort.first, alphas=alphas))
    return UserAdapters(spec, stacks, roster)


def _config_of(user: UserSettings) -> AdapterConfig:
    return AdapterConfig(kind=user.kind, rank=user.rank, hidden=list(user.hidden))
