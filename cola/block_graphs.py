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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cola.block_capture import BlockCapture
from cola.block_memory import Buffer, Capturer
from cola.block_notes import NotedCall, Notes
from cola.block_signature import Signature, sign
from cola.errors import TrainingError
from cola.sites import SiteName
from cola.taps import Taps

logger = logging.getLogger(__name__)

MAX_SHAPES = 8
"""Shapes of batches that are captured: each takes about a second, and memory around the blocks."""

BatchShape = frozenset[tuple[str, torch.Size, torch.dtype]]


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


@dataclass(frozen=True)
class _Shape:
    """What graphs are chosen by: the batch, and how the first block was called with it."""

    batch: BatchShape
    first: Signature

    def __hash__(self) -> int:
        return hash(self.batch)  # what a block is called with may have no hash


Captured = Mapping[nn.Module, BlockCapture]
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
        shape, notes = self._shape, self._notes
        self._begin(frozenset())
        if shape is not None and notes is not None and notes.calls:
            self._capture(shape, notes.calls)

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
        self._has_run: set[nn.Module] = set()
        self._notes: Notes | None = None
        for captured in self._captured.values():
            for capture in captured.values():
                capture.forget()

    def _run(self, block: _Block, *args: Any, **kwargs: Any) -> Any:
        """What a block does when it is called."""
        module = block.module
        if not self._taps.is_recording or module in self._has_run:
            return block.forward(*args, **kwargs)
        self._has_run.add(module)
        signature, tensors = sign(args, kwargs, self._device)
        if self._shape is None:
            self._choose(signature)
        assert self._shape is not None
        capture = self._captured.get(self._shape, {}).get(module)
        if capture is not None and capture.signature == signature:
            return capture(tensors)
        if self._notes is None:
            return block.forward(*args, **kwargs)
        noted = self._notes.begin(module, block.forward, signature, tensors)
        answer = block.forward(*args, **kwargs)
        noted.end(answer)
        return answer

    def _choose(self, first: Signature) -> None:
        """Decides what becomes of this step: it is replayed, noted to be captured, or neither."""
        shape = self._shape = _Shape(self._batch, first)
        has_room = len(self._captured) < MAX_SHAPES
        if has_room and shape in self._seen and shape not in self._captured:
            self._notes = Notes()
        if has_room:
            self._seen.add(shape)

    def _capture(self, shape: _Shape, noted: Sequence[NotedCall]) -> None:
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

    def _capture_forward(self, noted: Sequence[NotedCall]) -> list[BlockCapture]:
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
                    one.forward,
                    one.signature,
                    buffers,
                    taps=self._taps,
                    capturer=self._capturer,
                )
            )
            if len(captures) > 1 and (spent := noted[len(captures) - 2].spent):
                captures[-2].let_go(spent)
                captures[-1].let_go_of_inputs(
                    [origin.is_previous and spent[origin.position] for origin in one.origins]
                )
        return captures

    def _capture_backward(
        self, noted: Sequence[NotedCall], captures: Sequence[BlockCapture]
    ) -> None:
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
