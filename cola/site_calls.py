"""One run of a site: the node of the graph that reports its gradient, and what is known of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cola.adaptation_data import Parcel
from cola.kept_rows import KeptRows
from cola.sites import SiteName

Report = Callable[..., None]


class TapGradient(torch.autograd.Function):
    """Identity whose backward reports the gradient, and the hidden input if it was kept for that.

    x is saved through autograd, not held by a closure, so that gradient checkpointing can drop it
    and recompute it, and changing it in place is noticed. `anchor` is a scalar that requires a
    gradient: it makes the output part of the graph where the base model, being frozen, has none
    yet; it never receives one.
    """

    @staticmethod
    def forward(  # noqa: D102, what autograd asks for
        ctx: Any, adapted_hidden: Tensor, kept: Tensor | None, anchor: Tensor, report: Report
    ) -> Tensor:
        if kept is not None:
            ctx.save_for_backward(kept)
        ctx.report = report
        if not adapted_hidden._is_view():
            # Returned as it is, without a copy, and still open to in-place operations downstream.
            ctx.mark_dirty(adapted_hidden)
        return adapted_hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: D102
        (hidden_gradient,) = gradients
        ctx.report(hidden_gradient, *ctx.saved_tensors)
        return hidden_gradient, None, None, None


def not_differentiated(*gradients: Tensor) -> None:
    """Stands in where nobody may report."""
    raise AssertionError("the graph of a recompute was differentiated")


def same_tensor(tensor: Tensor) -> Tensor:
    """The tensor that this one is a mere reshape of, rows kept; else itself."""
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or base.shape[-1:] != tensor.shape[-1:]:
        return tensor
    return base if base.is_contiguous() and tensor.is_contiguous() else tensor


class Unchanged:
    """Remembers the version of a tensor without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._alias = tensor.detach()  # shares the count of in-place changes, and, until the
        self._alias.data = tensor.new_empty(0)  # next line, the memory
        self._version = self._alias._version

    @property
    def holds(self) -> bool:
        """Whether nothing was written to the tensor since."""
        return self._alias._version == self._version


@dataclass(kw_only=True)
class Taped:
    """One run of a site while a graph was captured.

    Attributes:
        site: which.
        dtype: that the site computed in.
        hidden_gradient: where its gradient will be, once the backward pass was captured, too.
    """

    site: SiteName
    dtype: torch.dtype
    hidden_gradient: Tensor | None = None

    def note(self, hidden_gradient: Tensor) -> None:
        """Where the gradient will be."""
        self.hidden_gradient = hidden_gradient


@dataclass(frozen=True, kw_only=True)
class Tape:
    """Runs of sites while a graph was captured, in order, and where their hidden inputs will be.

    Attributes:
        anchor: as that of the taps; made on the stream that captures, which waits for no other.
    """

    anchor: Tensor
    calls: list[Taped] = field(default_factory=list)
    hidden_inputs: list[Tensor] = field(default_factory=list)


class SiteRun(NamedTuple):
    """A site has run in a forward pass that will be differentiated.

    Attributes:
        site: which.
        hidden_input: (..., D), as the site got it, or its kept rows, (N', D); not changed in place
            before the backward pass.
        dtype: that the site computed in: under autocast x may be wider than the product made of it,
            and what was multiplied is x rounded.
        kept: rows that travel; None: all.
    """

    site: SiteName
    hidden_input: Tensor
    dtype: torch.dtype
    kept: KeptRows | None = None

    @property
    def num_bytes(self) -> int:
        """Of what travels."""
        x = self.hidden_input
        num_rows = x.shape[:-1].numel() if self.kept is None else len(self.kept.index)
        return num_rows * x.shape[-1] * x.element_size()


@dataclass(frozen=True, kw_only=True)
class SiteCall:
    """One run of a site in a recorded forward pass.

    Attributes:
        site: which.
        shape: of the hidden input, or, of a replayed site, of what of it travels.
        kept: its rows that travel; None: all.
        sent: the hidden input, if it has left.
        unchanged: watches over it then.
    """

    site: SiteName
    shape: torch.Size
    kept: KeptRows | None
    sent: Parcel | None = None
    unchanged: Unchanged | None = None
