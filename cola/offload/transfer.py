"""Moves adaptation data from the base device to the offload device, and parameters back.

Algorithm 1, lines 9 and 15. From a GPU the copies go to pinned host memory on a side stream, and
the worker waits for them, not the base device: a blocking copy in a hook would stall forward and
backward at every site. What comes back lies in pinned memory too: from there the base device
fetches it in its own order, several times faster than from pageable memory, and its host does not
wait.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData

Parcel = Callable[[], AdaptationData]
"""Adaptation data on its way; calling it waits for arrival."""


class Transfer:
    """Sends adaptation data of one base device to one offload device."""

    def __init__(self, source: torch.device, target: torch.device) -> None:
        self._target = target
        crosses = source.type == "cuda" and source != target
        self._stream = torch.cuda.Stream(source) if crosses else None  # type: ignore[no-untyped-call]

    def send(self, data: AdaptationData) -> Parcel:
        """Starts the copies and returns at once; on one device nothing is copied."""
        if self._stream is None:
            return lambda: data
        stream, device = self._stream, data.hidden_input.device
        # Both tensors were produced on the base stream: copy only after that point.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            hidden_input = self._copy(data.hidden_input, stream)
            hidden_gradient = self._copy(data.hidden_gradient, stream)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(stream)

        def receive() -> AdaptationData:
            arrived.synchronize()
            return AdaptationData(
                hidden_input=hidden_input, hidden_gradient=hidden_gradient, rows=data.rows
            )

        return receive

    def stage(self, published: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Parameters on their way back, laid where the base device fetches them from."""
        if self._stream is None or self._target.type != "cpu":
            return published
        return {name: tensor.pin_memory() for name, tensor in published.items()}

    def _copy(self, tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
        pinned = self._target.type == "cpu"
        copy = torch.empty_like(tensor, device=self._target, pin_memory=pinned)
        copy.copy_(tensor, non_blocking=True)
        # The base stream may free its tensor before the copy has run: tell the allocator.
        tensor.record_stream(stream)
        return copy
