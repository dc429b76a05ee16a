"""Adaptation data: what leaves the base model, one (hidden input, hidden gradient) pair per site.

Shape legend of the whole package: B batch, T tokens, N = B*T rows, D site input size, H site output
size, R rank, K users, M sites, I interval. The leading axis is rows; images keep (N, C, height,
width). This gate is the only place where shapes are checked at run time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola.config.choices import Reduction
from cola.user_rows import UserRows

Parcel = Callable[[], Tensor]
"""A hidden input or gradient on its way, rows (N, ...); calling it where it goes waits for it."""


@dataclass(frozen=True, kw_only=True)
class AdaptationData:
    """One pair that a site sends to be fitted. Paper: Algorithm 1, lines 5 and 7.

    Attributes:
        hidden_input: x, shape (N, D) or (N, D, height, width), detached.
        hidden_gradient: gradient of the task loss by the adapted hidden representation, shape
            (N, H) or (N, H, height', width'), detached, same dtype and device.
        rows: whose they are, where users have adapters of their own.

    Raises:
        ValueError: rows, rank, dtype, device or detachment do not fit.
    """

    hidden_input: Tensor
    hidden_gradient: Tensor
    rows: UserRows | None = None

    def __post_init__(self) -> None:
        x, g = self.hidden_input, self.hidden_gradient
        if x.shape[0] != g.shape[0] or x.dim() != g.dim():
            raise ValueError(
                f"hidden input {tuple(x.shape)} and hidden gradient {tuple(g.shape)} must have the "
                "same number of rows and axes"
            )
        if x.dtype != g.dtype or not x.is_floating_point():
            raise ValueError(f"hidden input is {x.dtype}, hidden gradient {g.dtype}; both must be "
                             "the same floating-point type")  # fmt: skip
        if x.device != g.device:
            raise ValueError(f"hidden input is on {x.device}, hidden gradient on {g.device}")
        if x.requires_grad or g.requires_grad:
            raise ValueError("adaptation data must be detached from the base model's graph")

    @property
    def num_bytes(self) -> int:
        """Size on the wire, without sharing or dropping anything."""
        return self.hidden_input.nbytes + self.hidden_gradient.nbytes

    def to(self, dtype: torch.dtype) -> "AdaptationData":
        """The same data in another floating-point type."""
        if self.hidden_input.dtype is dtype:
            return self
        return AdaptationData(
            hidden_input=self.hidden_input.to(dtype),
            hidden_gradient=self.hidden_gradient.to(dtype),
            rows=self.rows,
        )


def concatenate(batches: Sequence[AdaptationData]) -> AdaptationData:
    """Buffers several batches as one. Paper: Algorithm 1, line 11.

    Gradients sum over rows and the adapter is constant inside an interval, so fitting the
    concatenation equals accumulating the batches one by one, at I times the memory.
    """
    return AdaptationData(
        hidden_input=torch.cat([batch.hidden_input for batch in batches]),
        hidden_gradient=torch.cat([batch.hidden_gradient for batch in batches]),
    )


class IntervalWeights:
    """Weights of the batches of one interval, so that I batches equal one batch I times larger.

    Every batch's loss is a mean over its own scored terms. Scaling batch b by n_b / n_1 before its
    backward pass and the sum by n_1 / (n_1 + n_2 + ...) when the interval closes gives the mean
    over all terms. The form keeps a one-batch interval free of any rounding (both factors are 1).
    With `Reduction.sum` all factors are 1, as in the reference implementation.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self._first = 0
        self._total = 0

    def add(self, num_terms: int) -> float:
        """Counts a batch in; returns the factor on its loss."""
        weight = 1 if self._reduction is Reduction.sum else num_terms
        self._first = self._first or weight
        if self._reduction is Reduction.mean:
            self._total += weight
        return weight / (self._first or 1)  # without a scored term there is no loss to weigh

    def scale(self) -> float:
        """Factor on the interval's accumulated gradient, given the batches so far."""
        return self._first / self._total if self._total else 1.0

    def reset(self) -> None:
        """Starts the next interval."""
        self._first = self._total = 0

    def state_dict(self) -> dict[str, Any]:
        """Position inside the interval, for a checkpoint."""
        return {"first": self._first, "total": self._total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues inside an interval."""
        self._first, self._total = state["first"], state["total"]
