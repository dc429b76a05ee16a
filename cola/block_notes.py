"""What is noted of one training step, so that its calls of blocks can be captured."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from cola.block_signature import Signature


class Origin(NamedTuple):
    """Where a tensor that a block is called with comes from.

    Attributes:
        is_previous: an output of the block before; else it comes from around the blocks.
        position: of the output, or among the tensors from around.
    """

    is_previous: bool
    position: int


@dataclass(kw_only=True)
class NotedCall:
    """A call that is to be captured.

    Attributes:
        block: that was called.
        forward: its own.
        signature: how it was called.
        origins: of the tensors that it was called with.
        outputs: that it answered with.
        memory: of each output; views of it, and what is saved for the backward pass, share it.
        spent: whether that was free again when the block after had run; empty: not known.
    """

    block: nn.Module
    forward: Callable[..., Any]
    signature: Signature
    origins: list[Origin]
    outputs: list[weakref.ref[Tensor]] = field(default_factory=list)
    memory: list[StorageWeakRef] = field(default_factory=list)
    spent: list[bool] = field(default_factory=list)

    def end(self, answer: Any) -> None:
        """The block has run."""
        outputs = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
        self.outputs = [weakref.ref(output) for output in outputs]
        self.memory = [StorageWeakRef(output.untyped_storage()) for output in outputs]  # type: ignore[no-untyped-call]


class Notes:
    """Calls of one step.

    Attributes:
        calls: in order.
    """

    def __init__(self) -> None:
        self.calls: list[NotedCall] = []
        self._around: list[weakref.ref[Tensor]] = []

    def begin(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        signature: Signature,
        tensors: Sequence[Tensor],
    ) -> NotedCall:
        """A block is about to run: what the last but one answered is of use to others, or free."""
        if len(self.calls) > 1:
            earlier = self.calls[-2]
            earlier.spent = [memory.expired() for memory in earlier.memory]  # type: ignore[no-untyped-call]
        origins = [self._origin(tensor) for tensor in tensors]
        call = NotedCall(block=block, forward=forward, signature=signature, origins=origins)
        self.calls.append(call)
        return call

    def _origin(self, tensor: Tensor) -> Origin:
        previous = self.calls[-1].outputs if self.calls else []
        for is_previous, known in ((True, previous), (False, self._around)):
            for index, reference in enumerate(known):
                if reference() is tensor:
                    return Origin(is_previous, index)
        self._around.append(weakref.ref(tensor))
        return Origin(is_previous=False, position=len(self._around) - 1)
