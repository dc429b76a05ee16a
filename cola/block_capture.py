"""One block of the base model as two captured graphs: its forward pass and its backward pass.

A replay launches all kernels of a pass by one call. They read and write the memory that they were
captured with: what they read is copied there before, unless it is there already, as between
neighbouring blocks, and what is to be kept is copied out before the next replay. So the graphs of a
model share one pool of memory, in which a later one may use what an earlier one is done with, just
as the passes themselves would: they are captured in the order in which they are replayed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from cola.block_memory import Buffer, Capturer
from cola.block_nodes import Entrance, Replayed
from cola.block_signature import Signature
from cola.kept_rows import KeptRows
from cola.packing import pack
from cola.site_calls import SiteCall, SiteRun, Taped
from cola.sites import SiteName
from cola.taps import Taps

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Site:
    """One run of a site within a block.

    Attributes:
        site: which.
        dtype: that it computed in.
        index: of its hidden input among the block's distinct ones.
    """

    site: SiteName
    dtype: torch.dtype
    index: int


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """Autograd's graph, between the two captures.

    Its ends are edges: the memory of inputs and outputs is not held by them.
    """

    inputs: list[GradientEdge]
    outputs: list[GradientEdge]
    calls: list[Taped]
    anchor: GradientEdge


class BlockCapture:
    """Both graphs of one block, for one signature.

    Attributes:
        outputs: where a replay writes them.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        signature: Signature,
        buffers: Sequence[Buffer],
        *,
        taps: Taps,
        capturer: Capturer,
    ) -> None:
        """Captures the forward pass; that of the block before has been captured.

        Args:
            forward: of the block.
            signature: of its calls.
            buffers: where it reads its tensors, in order.
            taps: on its sites.
            capturer: of the model's graphs.
        """
        self.signature = signature
        self._run, self._buffers = forward, list(buffers)
        self._taps, self._capturer = taps, capturer
        self._needed = [tensor.needs_gradient for tensor in signature.tensors]
        self._calls: list[SiteCall] = []
        written, self._replay_forward = capturer.capture(self._run_forward)
        num_outputs = len(self._differentiable)
        self.outputs, self._hidden_inputs = written[:num_outputs], written[num_outputs:]
        self._leaves_early = all(taps.takes_early(one.site) for one in self._sites)
        if self._leaves_early:
            self._hidden_inputs = self._released(self._hidden_inputs)

    def let_go(self, spent: Sequence[bool]) -> None:
        """Outputs that nobody reads once the block after has run, whose forward pass is captured.

        Args:
            spent: whether that is so, of each output.
        """
        pairs = zip(self.outputs, spent, strict=True)
        self.outputs = [self._capturer.alias(x) if is_spent else x for x, is_spent in pairs]

    def let_go_of_inputs(self, spent: Sequence[bool]) -> None:
        """The same of the block after, for each tensor that it reads."""
        self._open(compress(self._buffers, spent))

    def capture_backward(self, following: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Captures the backward pass; that of the block after has been captured.

        Args:
            following: where the block after writes the gradient of each output; None: elsewhere.

        Returns:
            Where the gradient of each input is written, if it needs one.
        """
        pairs = compress(zip(self.outputs, following, strict=True), self._differentiable)
        self._gradients = [
            Buffer(memory=torch.empty_like(output))
            if gradient is None
            else Buffer(memory=gradient, is_borrowed=True)
            for output, gradient in pairs
        ]
        written, self._replay_backward = self._capturer.capture(self._run_backward)
        num_sites = len(self._reported)
        del self._graph
        self._hidden_gradients = self._released(written[:num_sites])
        self._hidden_inputs = self._released(self._hidden_inputs)
        self.outputs = self._released(self.outputs)
        self._input_gradients = written[num_sites:]
        return _spread(self._input_gradients, self._needed)

    def finish(self) -> None:
        """The backward pass of the block before has been captured, too."""
        self._input_gradients = self._released(self._input_gradients)
        self._open([*self._buffers, *self._gradients])

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """What the block answers, in the graph of autograd that goes on around it."""
        outputs = Replayed.apply(self, self._taps.anchor, *tensors)  # type: ignore[no-untyped-call]
        stream = iter(outputs)
        leaves = [next(stream) if leaf is None else leaf[0] for leaf in self._answer]
        return pytree.tree_unflatten(leaves, self._answer_spec)

    def forward(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
        """Outputs, and which of them can be differentiated; hidden inputs leave."""
        self._taps.require(list(dict.fromkeys(one.site for one in self._sites)))
        for buffer, tensor in zip(self._buffers, tensors, strict=True):
            buffer.fill(tensor)
        self._replay_forward()
        self._taps.fetch_ahead()
        kept = [
            self._taps.kept_rows(one.site, self._hidden_inputs[one.index].shape)
            for one in self._sites
        ]
        inputs = self._copied_inputs(kept) if self._leaves_early else self._hidden_inputs
        runs = [
            SiteRun(one.site, inputs[one.index], one.dtype, rows)
            for one, rows in zip(self._sites, kept, strict=True)
        ]
        self._calls = self._taps.ran(runs, leave=self._leaves_early)
        return [output.detach() for output in self.outputs], self._differentiable

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs; hidden gradients leave."""
        found = compress(gradients, self._differentiable)
        for buffer, gradient in zip(self._gradients, found, strict=True):
            if gradient is None:
                buffer.memory.zero_()
            else:
                buffer.fill(gradient)
        self._replay_backward()
        kept = [call.kept for call in self._calls]
        stayed = None if self._leaves_early else self._copied_inputs(kept)
        hidden_gradients = pack(
            self._hidden_gradients, [_indices(kept[index]) for index in self._reported]
        )
        for index, hidden_gradient in zip(self._reported, hidden_gradients, strict=True):
            hidden_input = None if stayed is None else stayed[self._sites[index].index]
            self._taps.arrived(self._calls[index], hidden_gradient, hidden_input)
        self._calls = []
        self._taps.leave(self._sites[index].site for index in self._reported)
        return [
            g if g is None else g.detach() for g in _spread(self._input_gradients, self._needed)
        ]

    def forget(self) -> None:
        """The step has ended: what was copied from is not kept."""
        for buffer in [*self._buffers, *self._gradients]:
            buffer.source = None

    def _copied_inputs(self, kept: Sequence[KeptRows | None]) -> list[Tensor]:
        """Distinct hidden inputs, of which nothing but what travels, of each site, is needed."""
        wanted: list[set[KeptRows | None]] = [set() for _ in self._hidden_inputs]
        for one, rows in zip(self._sites, kept, strict=True):
            wanted[one.index].add(rows)
        alike = [own.pop() if len(own) == 1 else None for own in wanted]
        return pack(self._hidden_inputs, [_indices(rows) for rows in alike])

    def _run_forward(self) -> list[Tensor]:
        """The work of the forward pass: outputs and distinct hidden inputs."""
        device = self._taps.anchor.device
        with self._taps.taping() as tape, self.signature.computing(device):
            inputs: list[Tensor] = [
                Entrance.apply(buffer.memory, tape.anchor) if needed else buffer.memory.detach()  # type: ignore[no-untyped-call]
                for buffer, needed in zip(self._buffers, self._needed, strict=True)
            ]
            args, kwargs = self.signature.bind(inputs)
            answer = self._run(*args, **kwargs)
        leaves, self._answer_spec = pytree.tree_flatten(answer)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._answer = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        distinct = list({id(x): x for x in tape.hidden_inputs}.values())
        places = {id(x): index for index, x in enumerate(distinct)}
        self._sites = [
            _Site(site=call.site, dtype=call.dtype, index=places[id(x)])
            for call, x in zip(tape.calls, tape.hidden_inputs, strict=True)
        ]
        self._differentiable = [output.requires_grad for output in outputs]
        self._graph = _Graph(
            inputs=[get_gradient_edge(x) for x in compress(inputs, self._needed)],
            outputs=[get_gradient_edge(x) for x in compress(outputs, self._differentiable)],
            calls=tape.calls,
            anchor=get_gradient_edge(tape.anchor),
        )
        return [tensor.detach() for tensor in [*outputs, *distinct]]

    def _run_backward(self) -> list[Tensor]:
        """The work of the backward pass: hidden gradients and gradients of the inputs."""
        graph = self._graph
        found = torch.autograd.grad(
            graph.outputs,
            [*graph.inputs, graph.anchor],
            [buffer.memory for buffer in self._gradients],
            allow_unused=True,
        )
        buffers = compress(self._buffers, self._needed)
        input_gradients = [
            torch.zeros_like(buffer.memory) if gradient is None else gradient
            for gradient, buffer in zip(found[:-1], buffers, strict=True)
        ]
        reported = [(i, call.hidden_gradient) for i, call in enumerate(graph.calls)]
        # Last to first, as they come; a site whose output is not used gets none.
        arrived = {i: gradient for i, gradient in reversed(reported) if gradient is not None}
        self._reported = list(arrived)
        return [*arrived.values(), *input_gradients]

    def _open(self, buffers: Iterable[Buffer]) -> None:
        for buffer in buffers:
            if buffer.is_borrowed:
                buffer.memory = self._capturer.alias(buffer.memory)

    def _released(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [self._capturer.alias(tensor) for tensor in tensors]


def _indices(kept: KeptRows | None) -> Tensor | None:
    return None if kept is None else kept.index


def _spread(tensors: Iterable[T], where: Iterable[bool]) -> list[T | None]:
    """One tensor after the other where one belongs, None elsewhere."""
    stream = iter(tensors)
    return [next(stream) if is_one else None for is_one in where]
