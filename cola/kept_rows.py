"""Rows of a padded batch that can have a hidden gradient: only they have to travel.

A row of padding is hidden from every other one and no scored logit sits on it, so that its hidden
gradient is exactly zero, and with it what it adds to any adapter's gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from cola.runtime import upload
from cola.sites import SiteName
from cola.user_rows import UserRows

MIN_DROPPED_SHARE = 0.05
"""Share of padding below which all rows travel: picking rows is a copy, which has to pay."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptRows:
    """The real tokens of one padded text.

    Attributes:
        shape: (B, T) of the padded text.
        index: (N',) int64, rows to keep among its B*T, ascending, on the base device.
        rows: whose the kept rows are, where users have adapters of their own.
    """

    shape: tuple[int, int]
    index: Tensor
    rows: UserRows | None = None

    def applies_to(self, shape: torch.Size) -> bool:
        """Whether a site's hidden input of this shape lies token by token, (B, T, D)."""
        return len(shape) == 3 and shape[:2] == self.shape

    def take(self, tensor: Tensor) -> Tensor:
        """Kept rows (N', D) of a tensor (B, T, D) or (B*T, D), a copy; or of what was taken."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        is_taken = len(rows) == len(self.index)  # fewer than B*T: some are always dropped
        return rows if is_taken else rows.index_select(0, self.index)

    def is_zero_elsewhere(self, tensor: Tensor) -> Tensor:
        """Whether all other rows of the tensor are exactly zero: bool, 0-dim, on its device."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        return ~rows.index_fill(0, self.index, 0.0).any()


def _look_away(site: SiteName, shape: torch.Size, hidden_gradient: Tensor) -> None:
    """Nothing is asked of this step's gradients."""


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """Rows of one training step.

    Attributes:
        users: whose they are, where users have adapters of their own.
        kept: which of them travel, by site; all where a site is missing.
        check: sees every hidden gradient, and the shape of the hidden input that belongs to it.
    """

    users: UserRows | None = None
    kept: Mapping[SiteName, KeptRows] = field(default_factory=dict)
    check: Callable[[SiteName, torch.Size, Tensor], None] = _look_away


def keep_rows(mask: Tensor, rows: UserRows | None, device: torch.device) -> KeptRows | None:
    """The rows of a padded text to keep.

    Args:
        mask: (B, T) true where a token is real, bool on the CPU.
        rows: whose the B rows are, where users have adapters of their own.
        device: of the base model; it is not waited for.

    Returns:
        None if all rows should travel: too little is padding, or a row is nothing else, which
        could leave a user without any.
    """
    lengths = mask.sum(dim=1)  # (B,)
    dropped = mask.numel() - int(lengths.sum())
    if dropped <= MIN_DROPPED_SHARE * mask.numel() or not lengths.all():
        return None
    index = mask.flatten().nonzero().flatten()
    return KeptRows(
        shape=(mask.shape[0], mask.shape[1]),
        index=upload(index, device),
        rows=None if rows is None else _of_users(rows, lengths),
    )


def _of_users(rows: UserRows, lengths: Tensor) -> UserRows:
    """Whose the kept rows are, where row b of the batch has `lengths[b]` of them."""
    ends = lengths.cumsum(0).tolist()
    bounds = [0, *(ends[end - 1] for end in rows.bounds[1:])]
    counts = tuple(last - first for first, last in pairwise(bounds))
    return UserRows(users=rows.users, counts=counts)
