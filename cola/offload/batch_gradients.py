"""Gradients that one batch makes for the adapters of a fitter, in few products.

Sites that share a hidden input (query and value) are fitted in one product of the sum of their
ranks. On a GPU, for which many small kernels are slow, so are adapters of equal shapes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.adapters import Adapter, LinearAdapter, LowRankAdapter
from cola.gradient_learning import (
    AdapterGradients,
    adapter_gradients,
    inner_products,
    linear_gradients,
    lowrank_gradients,
    stacked_lowrank_gradients,
)
from cola.offload.buffers import Buffers
from cola.offload.product_replays import ProductReplays
from cola.runtime import product_dtype
from cola.sites import SiteKind, SiteName

Batch = Sequence[tuple[SiteName, AdaptationData]]
"""One batch of a fitter, call by call of its sites."""


class _Call(NamedTuple):
    """One call of a site with a low-rank adapter."""

    site: SiteName
    adapter: LowRankAdapter
    data: AdaptationData

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that must have the same shape in a stack."""
        x, g = self.data.hidden_input, self.data.hidden_gradient
        return x, g, self.adapter.lora_a, self.adapter.lora_b


class BatchGradients:
    """Forms the gradients of some adapters, batch by batch."""

    def __init__(
        self,
        adapters: Mapping[SiteName, Adapter],
        *,
        scale: float,
        dtype: torch.dtype,
        buffers: Buffers,
        stacks: bool,
        replays: ProductReplays | None,
    ) -> None:
        """Adapters stay as they are.

        Args:
            adapters: by site.
            scale: alpha.
            dtype: of their parameters.
            buffers: memory for products on the host.
            stacks: whether low-rank adapters of equal shapes are fitted in one product, which takes
                a copy of their data.
            replays: captured products of the worker; None: none are.
        """
        self._adapters = adapters
        self._scale, self._dtype = scale, dtype
        self._buffers, self._stacks, self._replays = buffers, stacks, replays
        # Of sites that have run and whose gradient has not come: the hidden input, and A x.
        self._inner: dict[SiteName, tuple[Tensor, Tensor]] = {}

    def can_prepare(self, site: SiteName) -> bool:
        """Whether a part of a site's products needs no hidden gradient."""
        return self._lowrank(site) is not None

    def prepare(self, inputs: Sequence[tuple[SiteName, Tensor]]) -> None:
        """Forms what needs no hidden gradient, while those are still to come.

        Args:
            inputs: x (N, D) of sites that have run, the same tensor where it is the same.
        """
        together: dict[int, list[tuple[SiteName, LowRankAdapter]]] = {}
        for site, x in inputs:
            adapter = self._lowrank(site)
            if adapter is not None and product_dtype(x, self._dtype) is x.dtype:
                together.setdefault(id(x), []).append((site, adapter))
        tensors = {id(x): x for _, x in inputs}
        for key, own in together.items():
            products = inner_products([adapter for _, adapter in own], tensors[key])
            for (site, _), product in zip(own, products, strict=True):
                self._inner[site] = tensors[key], product

    def form(
        self, batch: Batch, is_first: Callable[[SiteName], bool]
    ) -> Iterator[tuple[SiteName, Mapping[str, Tensor]]]:
        """Gradients by name, call by call, in any order; each is taken before the next is formed.

        Args:
            batch: data of some sites.
            is_first: whether a site has no gradients of an earlier batch.
        """
        together: dict[int, list[_Call]] = {}
        for site, data in batch:
            adapter, lowrank = self._adapters[site], self._lowrank(site)
            data = data.to(product_dtype(data.hidden_input, self._dtype))
            is_matrix = adapter.spec.kind is not SiteKind.conv2d
            if lowrank is not None:
                key = id(data.hidden_input)  # sites with one input come with one tensor
                together.setdefault(key, []).append(_Call(site, lowrank, data))
            elif is_matrix and isinstance(adapter, LinearAdapter) and _is_on_host(data):
                product = self._buffers.take(adapter.weight.shape, data.hidden_input.dtype)
                yield site, linear_gradients(adapter, data, self._scale, out=product)
                self._buffers.give(product)
            else:
                yield site, adapter_gradients(adapter, data, self._scale)
        for alike in self._alike(list(together.values())):
            can_replay = all(is_first(call.site) for calls in alike for call in calls)
            for calls, own in zip(alike, self._products(alike, can_replay), strict=True):
                yield from zip((call.site for call in calls), own, strict=True)

    def _products(self, alike: list[list[_Call]], can_replay: bool) -> list[AdapterGradients]:
        """Of each hidden input, of each of its calls.

        What is replayed lands where the gradients of an earlier batch may lie, hence `can_replay`.
        """
        adapters = [[call.adapter for call in calls] for calls in alike]
        inputs = [calls[0].data.hidden_input for calls in alike]
        gradients = [[call.data.hidden_gradient for call in calls] for calls in alike]
        if len(alike) == 1:
            inner = self._taken(alike[0])
            return [lowrank_gradients(adapters[0], inputs[0], gradients[0], self._scale, inner)]
        if self._replays is not None and can_replay:
            found = self._replays.gradients(adapters, inputs, gradients, self._scale)
            if found is not None:
                return found
        return stacked_lowrank_gradients(adapters, inputs, gradients, self._scale)

    def _lowrank(self, site: SiteName) -> LowRankAdapter | None:
        """A site's adapter, if its gradient is a few plain products."""
        adapter = self._adapters[site]
        if isinstance(adapter, LowRankAdapter) and adapter.spec.kind is not SiteKind.conv2d:
            return adapter
        return None

    def _taken(self, calls: list[_Call]) -> list[Tensor] | None:
        """What was prepared for all calls that meet one hidden input; None: not for all."""
        found = []
        for call in calls:
            prepared = self._inner.pop(call.site, None)
            if prepared is None or prepared[0] is not call.data.hidden_input:
                return None
            found.append(prepared[1])
        return found

    def _alike(self, inputs: list[list[_Call]]) -> list[list[list[_Call]]]:
        """Hidden inputs, each with its calls, by those that can be fitted in one product."""
        if not self._stacks:
            return [[calls] for calls in inputs]
        alike: dict[tuple[torch.Size, ...], list[list[_Call]]] = {}
        single = []
        for calls in inputs:
            shapes = [tuple(tensor.shape for tensor in call.tensors) for call in calls]
            if len(set(shapes)) == 1:
                alike.setdefault((*shapes[0], torch.Size([len(calls)])), []).append(calls)
            else:  # adapters of one input that differ among themselves
                single.append([calls])
        return [*alike.values(), *single]


def _is_on_host(data: AdaptationData) -> bool:
    return data.hidden_input.device.type == "cpu"
