"""The loss that is differentiated: a batch's, as heavy as its interval makes it.

Of the whole batch where it has one owner; row by row where it has several, so that each user's rows
can be averaged by themselves and what is broken in one row stays there.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from cola.adaptation_data import IntervalWeights
from cola.config.choices import Objective, Reduction, UserLoss
from cola.objectives import row_losses, task_loss
from cola.runtime import upload
from cola.task_data import Batch


class IntervalLoss(Protocol):
    """Loss of one batch of an interval."""

    def add(self, batch: Batch) -> None:
        """Counts a batch in, before its forward pass."""

    def __call__(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What to differentiate, and the detached mean over scored terms; both scalars."""

    def scale(self) -> float:
        """Factor on all accumulated gradients, given the interval's batches so far."""

    def user_scales(self) -> tuple[float, ...] | None:
        """(K,) the same by user, where users are averaged apart."""

    def reset(self) -> None:
        """Starts the next interval."""

    def state_dict(self) -> dict[str, Any]:
        """Position inside the interval."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues inside an interval."""


class BatchLoss:
    """The mean loss of batches that have one owner."""

    def __init__(self, objective: Objective, reduction: Reduction) -> None:
        self._objective = objective
        self._weights = IntervalWeights(reduction)
        self._weight = 1.0

    def add(self, batch: Batch) -> None:
        """Counts a batch in."""
        self._weight = self._weights.add(batch.num_terms)

    def __call__(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean over the batch, weighted by its number of terms."""
        loss = task_loss(self._objective, logits, batch)
        return loss * self._weight, loss.detach()

    def scale(self) -> float:
        """Factor on all accumulated gradients."""
        return self._weights.scale()

    def user_scales(self) -> None:
        """There are no users apart."""

    def reset(self) -> None:
        """Starts the next interval."""
        self._weights.reset()

    def state_dict(self) -> dict[str, Any]:
        """Position inside the interval."""
        return self._weights.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues inside an interval."""
        self._weights.load_state_dict(dict(state))


class UserLosses:
    """The loss of batches whose rows belong to several users.

    With `UserLoss.batch` every row counts alike, as the paper has it. With `per_user` a user's rows
    are averaged over the user's own terms, in the interval too, as if the user trained alone.
    """

    def __init__(
        self, objective: Objective, reduction: Reduction, *, loss: UserLoss, num_users: int
    ) -> None:
        self._objective = objective
        self._is_apart = loss is UserLoss.per_user
        self._weights = [
            IntervalWeights(reduction) for _ in range(num_users if self._is_apart else 1)
        ]
        self._rows = torch.empty(2, 0)  # weight and number of terms of each row of the batch

    def add(self, batch: Batch) -> None:
        """Counts a batch in."""
        assert batch.rows is not None
        assert batch.row_terms is not None
        owners = batch.rows.slices() if self._is_apart else [(0, slice(None))]
        weights = torch.zeros(len(batch.row_terms), dtype=torch.float64)
        for owner, where in owners:
            num_terms = int(batch.row_terms[where].sum())
            weights[where] = self._weights[owner].add(num_terms) / max(num_terms, 1)
        self._rows = torch.stack([weights, batch.row_terms.double()])

    def __call__(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted sum over rows; what is logged leaves out rows that are not finite."""
        losses = row_losses(self._objective, logits, batch)  # (B,)
        weights, terms = upload(self._rows.to(losses.dtype), losses.device)
        seen = losses.detach()
        is_finite = seen.isfinite()
        mean = torch.where(is_finite, seen, 0.0).sum() / (terms * is_finite).sum().clamp(min=1)
        return (losses * weights).sum(), torch.where(is_finite.any(), mean, torch.nan)

    def scale(self) -> float:
        """Factor on all accumulated gradients; 1 where users have their own."""
        return 1.0 if self._is_apart else self._weights[0].scale()

    def user_scales(self) -> tuple[float, ...] | None:
        """(K,) where users are averaged apart."""
        return tuple(one.scale() for one in self._weights) if self._is_apart else None

    def reset(self) -> None:
        """Starts the next interval."""
        for weights in self._weights:
            weights.reset()

    def state_dict(self) -> dict[str, Any]:
        """Position inside the interval."""
        return {"weights": [weights.state_dict() for weights in self._weights]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues inside an interval."""
        for weights, own in zip(self._weights, state["weights"], strict=True):
            weights.load_state_dict(own)
