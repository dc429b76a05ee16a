"""How a block of the base model is called: what must be equal for a replay to mean the same."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Described(NamedTuple):
    """A tensor among a block's arguments."""

    shape: torch.Size
    dtype: torch.dtype
    needs_gradient: bool


@dataclass(frozen=True)
class Signature:
    """One way to call a block.

    Attributes:
        leaves: of the arguments; tensors are described, other values stand as they are.
        spec: how they are nested.
        autocast: dtype that products are rounded to; None: that of the tensors.
    """

    leaves: tuple[Any, ...]
    spec: Any
    autocast: torch.dtype | None

    @property
    def tensors(self) -> list[Described]:
        """Those that are described, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Described)]

    def bind(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors."""
        stream = iter(tensors)
        leaves = [next(stream) if isinstance(leaf, Described) else leaf for leaf in self.leaves]
        found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, self.spec)
        return found

    def computing(self, device: torch.device) -> AbstractContextManager[Any]:
        """Rounds products as the call did."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast, cache_enabled=False)


def sign(
    args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> tuple[Signature, list[Tensor]]:
    """How a block is called, and with which tensors."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described = tuple(
        Described(x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else x for x in leaves
    )
    rounds = torch.is_autocast_enabled(device.type)
    autocast = torch.get_autocast_dtype(device.type) if rounds else None
    return Signature(described, spec, autocast), [x for x in leaves if isinstance(x, Tensor)]
