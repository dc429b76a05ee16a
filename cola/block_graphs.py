"""Blocks of the base model as captured graphs: `model.cuda_graphs=true`.

At small batches the host is what binds: a large model has thousands of kernels per step, hooks at
every site, and fits in the same interpreter. Every block (a layer of a transformer) is therefore
captured, forward and backward, and replayed by one call for each. Between blocks everything is as
without graphs: parameters are waited for site by site, and adaptation data leaves block by block
while the base model goes on.

A batch of one shape is captured when it comes for the second time; others run as ever. What is
asked of the blocks is that their work depends on shapes alone: reading a value from the GPU ends
the run, and what Python decides otherwise from call to call goes unnoticed.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cola.block_capture import BlockCapture, Buffer, Capturer
from cola.block_signature import Signature, sign
from cola.errors import TrainingError
from cola.sites import SiteName
from cola.taps import Taps

logger = logging.getLogger(__name__)

MAX_SHAPES = 8
"""Shapes of batches that are captured: each takes about a second, and memory around the blocks."""

BatchShape = frozenset[tuple[str, torch.Size, torch.dtype]]


class _Origin(NamedTuple):
    """Where a tensor that a block is called with comes from.

    Attributes:
        is_previous: an output of the block before; else it comes from around the blocks.
        position: of the output, or among the tensors from around.
    """

    is_previous: bool
    position: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """A block and its own forward.

    Attributes:
        module: the block.
        forward: what its calls run; the class's, unless somebody replaced it.
        was_replaced: whether somebody did.
    """

    module: nn.Module
    forward: Callable[..., Any]
    was_replaced: bool


@dataclass(frozen=True, kw_only=True)
class _Noted:
    """A call that is to be captured."""

    block: _Block
    signature: Signature
    origins: list[_Origin]


@dataclass(frozen=True)
class _Shape:
    """What graphs are chosen by: the batch, and how the first block was called with it."""

    batch: BatchShape
    first: Signature

    def __hash__(self) -> int:
        return hash(self.batch)  # what a block is called with may have no hash


Captured = Mapping[_Block, BlockCapture]
"""All graphs for one shape. They share memory in their order: never mixed with those of another."""


class BlockGraphs:
    """Replays the blocks of a base model in training steps."""

    def __init__(self, base_model: nn.Module, taps: Taps, capturer: Capturer) -> None:
        """Stands in for the blocks' forward methods, until `remove`."""
        self._taps, self._capturer = taps, capturer
        self._device = taps.anchor.device
        self._blocks = [
            _Block(module=module, forward=module.forward, was_replaced="forward" in vars(module))
            for module in find_blocks(base_model, taps.sites)
        ]
        self._captured: dict[_Shape, Captured] = {}
        self._seen: set[_Shape] = set()
        self._begin(frozenset())
        for block in self._blocks:
            run = functools.partial(self._run, block)
            block.module.forward = functools.wraps(block.forward)(run)

    @property
    def held_bytes(self) -> int:
        """Memory of the graphs that the allocator does not count as allocated."""
        return self._capturer.held_bytes

    @contextmanager
    def step(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """One training step on such a batch; what has come for the second time is captured."""
        self._begin(frozenset((name, x.shape, x.dtype) for name, x in inputs.items()))
        yield
        shape, noted = self._shape, self._noted
        self._begin(frozenset())
        if shape is not None and noted:
            self._capture(shape, noted)

    def remove(self) -> None:
        """Gives the blocks their own forward methods back."""
        for block in self._blocks:
            if block.was_replaced:
                block.module.forward = block.forward
            else:
                del block.module.forward
        self._captured.clear()

    def _begin(self, batch: BatchShape) -> None:
        self._batch = batch
        self._shape: _Shape | None = None  # known when the first block runs
        self._has_run: set[_Block] = set()
        self._noted: list[_Noted] = []
        self._around: list[weakref.ref[Tensor]] = []
        self._previous: list[weakref.ref[Tensor]] = []
        self._notes = False
        for captured in self._captured.values():
            for capture in captured.values():
                capture.forget()

    def _run(self, block: _Block, *args: Any, **kwargs: Any) -> Any:
        """What a block does when it is called."""
        if not self._taps.is_recording or block in self._has_run:
            return block.forward(*args, **kwargs)
        self._has_run.add(block)
        signature, tensors = sign(args, kwargs, self._device)
        if self._shape is None:
            self._choose(signature)
        assert self._shape is not None
        capture = self._captured.get(self._shape, {}).get(block)
        if capture is not None and capture.signature == signature:
            return capture(tensors)
        if not self._notes:
            return block.forward(*args, **kwargs)
        origins = [self._origin(tensor) for tensor in tensors]
        self._noted.append(_Noted(block=block, signature=signature, origins=origins))
        answer = block.forward(*args, **kwargs)
        self._previous = [
            weakref.ref(x) for x in pytree.tree_leaves(answer) if isinstance(x, Tensor)
        ]
        return answer

    def _choose(self, first: Signature) -> None:
        """Decides what becomes of this step: it is replayed, noted to be captured, or neither."""
        shape = self._shape = _Shape(self._batch, first)
        is_known = shape in self._seen
        self._notes = is_known and shape not in self._captured and len(self._captured) < MAX_SHAPES
        if len(self._captured) < MAX_SHAPES:
            self._seen.add(shape)

    def _origin(self, tensor: Tensor) -> _Origin:
        for is_previous, known in ((True, self._previous), (False, self._around)):
            for index, reference in enumerate(known):
                if reference() is tensor:
                    return _Origin(is_previous, index)
        self._around.append(weakref.ref(tensor))
        return _Origin(is_previous=False, position=len(self._around) - 1)

    def _capture(self, shape: _Shape, noted: Sequence[_Noted]) -> None:
        try:
            with self._capturer.session():
                captures = self._capture_forward(noted)
                self._capture_backward(noted, captures)
        except RuntimeError as error:
            # What a broken capture leaves behind (random numbers, memory) is no state to go on in.
            raise TrainingError(
                "model.cuda_graphs=true: the blocks of the base model cannot be captured "
                f"({error}); leave it out"
            ) from error
        self._captured[shape] = {
            one.block: capture for one, capture in zip(noted, captures, strict=True)
        }
        logger.info(
            "model.cuda_graphs: captured %d blocks for %s%s",
            len(noted),
            ", ".join(f"{name} {tuple(size)}" for name, size, _ in sorted(shape.batch)),
            "; other shapes run without" if len(self._captured) == MAX_SHAPES else "",
        )

    def _capture_forward(self, noted: Sequence[_Noted]) -> list[BlockCapture]:
        """First to last: a block reads its inputs where the one before writes them."""
        around: dict[int, Buffer] = {}
        captures: list[BlockCapture] = []
        for one in noted:
            buffers = []
            for origin, (size, dtype, _) in zip(one.origins, one.signature.tensors, strict=True):
                if origin.is_previous:
                    memory = captures[-1].outputs[origin.position]
                    buffers.append(Buffer(memory=memory, is_borrowed=True))
                    continue
                if origin.position not in around:
                    memory = torch.empty(size, dtype=dtype, device=self._device)
                    around[origin.position] = Buffer(memory=memory)
                buffers.append(around[origin.position])
            captures.append(
                BlockCapture(
                    one.block.forward,
                    one.signature,
                    buffers,
                    taps=self._taps,
                    capturer=self._capturer,
                )
            )
        return captures

    def _capture_backward(self, noted: Sequence[_Noted], captures: Sequence[BlockCapture]) -> None:
        """Last to first: a block reads gradients where the one after writes them."""
        following: Mapping[int, Tensor] = {}
        after: BlockCapture | None = None
        for one, capture in zip(reversed(noted), reversed(captures), strict=True):
            gradients = capture.capture_backward(
                [following.get(index) for index in range(len(capture.outputs))]
            )
            following = {
                origin.position: gradient
                for origin, gradient in zip(one.origins, gradients, strict=True)
                if origin.is_previous and gradient is not None
            }
            if after is not None:
                after.finish()
            after = capture
        if after is not None:
            after.finish()


def find_blocks(base_model: nn.Module, sites: Sequence[SiteName]) -> list[nn.Module]:
    """Members of the outermost lists of layers that hold sites; without any, the whole model."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in base_model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in lists)
        holds = any(site.startswith(f"{name}.") for site in sites)
        if isinstance(module, nn.ModuleList) and holds and not is_inside:
            lists[name] = module
    blocks = dict.fromkeys(block for members in lists.values() for block in members)
    return list(blocks) or [base_model]
