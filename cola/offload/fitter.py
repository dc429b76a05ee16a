"""The fit of adapters: accumulate their gradients, clip, step. Algorithm 1, lines 11 to 16.

Lives on the offload device with the adapters and their optimizer states. Knows adapters and
adaptation data, nothing of the base model. Adapters of one fitter step at the same moment, by one
optimizer and few kernels; adapters that have to step apart get a fitter each.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cola.adapters import Adapter
from cola.config.choices import ClipMode
from cola.config.schema import OptimizerConfig
from cola.meters import count_bytes
from cola.offload.batch_gradients import Batch, BatchGradients
from cola.offload.buffers import MIN_BYTES, Buffers, is_reused
from cola.offload.fit import Fit
from cola.offload.gradient_norms import clip_factors, norms_of, require_finite
from cola.offload.product_replays import ProductReplays
from cola.optimizers import build_optimizer, optimizer_step
from cola.sites import SiteName


class AdapterFitter:
    """Owns adapters, their accumulated gradients and their optimizer.

    Attributes:
        adapters: g_w by site.
        held_bytes: by owner, as of the last step.
    """

    def __init__(
        self,
        adapters: Mapping[SiteName, Adapter],
        optimizer: OptimizerConfig,
        *,
        scale: float,
        buffers: Buffers | None = None,
        stacks: bool | None = None,
        replays: ProductReplays | None = None,
    ) -> None:
        """Takes over the adapters.

        Args:
            adapters: by site.
            optimizer: of the run; its `clip` other than `adapter` is left to the caller.
            scale: alpha.
            buffers: memory for gradients on the host, shared with other fitters.
            stacks: whether low-rank adapters of equal shapes are fitted in one product, which takes
                a copy of their data; None: on a GPU.
            replays: captured products of the worker; None: none are.
        """
        self._buffers = buffers or Buffers()
        self.adapters = dict(adapters)
        # Looked up once: walking a module's parameters costs more than stepping a small adapter.
        self._parameters = {s: dict(a.named_parameters()) for s, a in self.adapters.items()}
        everything = [p for named in self._parameters.values() for p in named.values()]
        self._dtype, self.device = everything[0].dtype, everything[0].device
        self._stacks = self.device.type == "cuda" if stacks is None else stacks
        self._batch = BatchGradients(
            self.adapters,
            scale=scale,
            dtype=self._dtype,
            buffers=self._buffers,
            stacks=self._stacks,
            replays=replays,
        )
        heads = [s for s, adapter in self.adapters.items() if adapter.spec.is_head]
        self._optimizer = build_optimizer(
            everything, optimizer, heads=[p for s in heads for p in self._parameters[s].values()]
        )
        clips = optimizer.clip is ClipMode["adapter"]
        self._clip_norm = optimizer.clip_norm if clips else None
        self._has_stepped = False
        # Of gradients that are a single batch's, (P,), if they came along.
        self._known_norms: dict[SiteName, Tensor] = {}
        self.held_bytes: dict[str, int] = {}
        self._note_held()

    def can_prepare(self, site: SiteName) -> bool:
        """Whether a part of a site's fit needs no hidden gradient."""
        return self._batch.can_prepare(site)

    @torch.no_grad()
    def prepare(self, inputs: Sequence[tuple[SiteName, Tensor]]) -> None:
        """Does what needs no hidden gradient for sites that have run; parameters are those then."""
        self._batch.prepare(inputs)

    @torch.no_grad()
    def accumulate(self, batch: Batch) -> None:
        """Adds the gradients of one batch; the parameters are constant inside an interval."""
        for site, gradients in self._batch.form(batch, lambda site: not self._gradients(site)):
            self._add(site, gradients, is_given=self._stacks)

    def add_gradients(
        self, site: SiteName, gradients: Mapping[str, Tensor], norms: Tensor | None = None
    ) -> None:
        """Adds a batch's gradient that was formed elsewhere, and that nobody else has.

        Args:
            site: whose.
            gradients: by parameter, in the order of the adapter's.
            norms: of each, (P,); None: not known.
        """
        is_first = not self._gradients(site)
        self._add(site, gradients, is_given=True)
        self._known_norms.pop(site, None)
        # What was rounded on its way has other norms.
        is_exact = all(gradient.dtype is self._dtype for gradient in gradients.values())
        if norms is not None and is_first and is_exact:
            self._known_norms[site] = norms

    def gradient_norm(self, site: SiteName, fit: Fit) -> Tensor:
        """Norm of the interval's gradient of one adapter, a scalar; zero without data."""
        gradients = self._gradients(site)
        if not gradients:
            return torch.zeros((), dtype=self._dtype, device=self.device)
        norm: Tensor = torch.linalg.vector_norm(self._norms({site: gradients}))
        return fit.gradient_scale * norm

    def step(self, fit: Fit, clip_factor: float | Tensor = 1.0) -> list[SiteName]:
        """Optimises every adapter that has data once, and empties the gradients.

        Args:
            fit: rate and scale of this adaptation.
            clip_factor: factor of a clip across adapters.

        Returns:
            Sites that stepped: those that had data.

        Raises:
            OffloadError: a gradient is not finite; the parameters are as before.
        """
        stepping = {site: found for site in self.adapters if (found := self._gradients(site))}
        if not stepping:
            return []
        factors: Iterable[float | Tensor] = [fit.gradient_scale * clip_factor] * len(stepping)
        on_host = self.device.type == "cpu"
        if on_host or self._clip_norm is not None:
            norms = self._norms(stepping)
            if on_host:
                require_finite(norms, stepping, fit.number)
            if self._clip_norm is not None:
                sizes = [len(own) for own in stepping.values()]
                factors = clip_factors(norms, sizes, fit.gradient_scale, self._clip_norm)
        for gradients, factor in zip(stepping.values(), factors, strict=True):
            # Most text runs have one batch per interval and no clip: nothing to multiply.
            if not (isinstance(factor, float) and factor == 1.0):
                torch._foreach_mul_(gradients, factor)
        optimizer_step(self._optimizer, fit.learning_rate)
        if not self._has_stepped:  # moments exist from now on; sizes never change again
            self._has_stepped = True
            self._note_held()
        for site in stepping:
            for parameter in self._parameters[site].values():
                if parameter.grad is not None:
                    self._buffers.give(parameter.grad)
                parameter.grad = None
        return list(stepping)

    def check_finite(self, number: int) -> None:
        """Raises if a gradient was not finite up to this adaptation.

        A GPU is asked here, at evaluations and checkpoints, since asking at every step would
        synchronise it; parameters that met such a gradient never become finite again.
        """
        if self.device.type == "cpu":
            return
        parameters = {s: [*named.values()] for s, named in self._parameters.items()}
        norms = norms_of([parameter for own in parameters.values() for parameter in own])
        require_finite(norms, parameters, number)

    def state_dict(self, site: SiteName) -> dict[str, Any]:
        """Adapter, optimizer state and the gradient of an interval in progress."""
        parameters = self._parameters[site]
        state = self._optimizer.state
        return {
            "adapter": dict(self.adapters[site].state_dict()),
            "optimizer": {i: state[p] for i, p in enumerate(parameters.values()) if p in state},
            "gradient": {n: p.grad for n, p in parameters.items() if p.grad is not None},
        }

    def load_state_dict(self, states: Mapping[SiteName, Mapping[str, Any]]) -> None:
        """Continues from `state_dict` of every site; optimizer keys may have become strings."""
        self._known_norms.clear()
        groups = self._optimizer.state_dict()["param_groups"]
        order = [id(p) for group in self._optimizer.param_groups for p in group["params"]]
        moments: dict[int, Any] = {}
        for site, parameters in self._parameters.items():
            state = states[site]
            own = list(parameters.values())
            self.adapters[site].load_state_dict(state["adapter"])
            for index, value in state["optimizer"].items():
                moments[order.index(id(own[int(index)]))] = copy.deepcopy(value)
            for name, parameter in parameters.items():
                gradient = state["gradient"].get(name)
                parameter.grad = None if gradient is None else gradient.to(parameter, copy=True)
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    @torch.no_grad()
    def _add(self, site: SiteName, gradients: Mapping[str, Tensor], *, is_given: bool) -> None:
        """Adds gradients, which lie in memory that may be kept, or are used again if large."""
        fresh: list[tuple[Tensor, Tensor]] = []
        for name, parameter in self._parameters[site].items():
            if parameter.grad is not None:
                parameter.grad.add_(gradients[name])
                continue
            gradient = gradients[name]
            if gradient.dtype is self._dtype and (is_given or gradient.nbytes < MIN_BYTES):
                parameter.grad = gradient.contiguous()  # nobody else has it
                continue
            parameter.grad = self._gradient_memory(parameter)
            fresh.append((parameter.grad, gradient))
        if fresh:
            torch._foreach_copy_([own for own, _ in fresh], [found for _, found in fresh])

    def _gradient_memory(self, parameter: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return self._buffers.take(parameter.shape, self._dtype)
        return torch.empty_like(parameter)

    def _norms(self, gradients: Mapping[SiteName, Sequence[Tensor]]) -> Tensor:
        """Norm of every gradient, (P,); those that are known are not computed again."""
        known = self._known_norms
        if not known:
            return norms_of([gradient for own in gradients.values() for gradient in own])
        return torch.cat([known[s] if s in known else norms_of(g) for s, g in gradients.items()])

    def _gradients(self, site: SiteName) -> list[Tensor]:
        return [p.grad for p in self._parameters[site].values() if p.grad is not None]

    def _note_held(self) -> None:
        """Bytes by owner: numbers, since others may ask while this worker changes the tensors.

        Large gradients lie in memory that other fitters use, too.
        """
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        parameters = [p for named in self._parameters.values() for p in named.values()]
        gradients = [p.grad for p in parameters if p.grad is not None and not is_reused(p.grad)]
        self.held_bytes = {
            "adapters": count_bytes([*parameters, *gradients]),
            "optimizer": count_bytes(value for value in state if isinstance(value, Tensor)),
        }
