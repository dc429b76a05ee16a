"""The fit of one adapter: accumulate its gradient, clip, step. Algorithm 1, lines 11 to 16.

Lives on the offload device with the adapter and its optimizer state. Knows adapters and adaptation
data, nothing of the base model.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.adapters import Adapter
from cola.config.choices import ClipMode
from cola.config.schema import OptimizerConfig
from cola.errors import OffloadError
from cola.gradient_learning import adapter_gradients
from cola.meters import count_bytes
from cola.optimizers import build_optimizer, optimizer_step


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One step of an adapter.

    Attributes:
        number: adaptation, 1 for the first.
        learning_rate: gamma_t.
        gradient_scale: factor on the accumulated gradient (interval reduction).
    """

    number: int
    learning_rate: float
    gradient_scale: float


class AdapterFitter:
    """Owns one adapter, its accumulated gradient and its optimizer.

    Attributes:
        adapter: g_w.
        held_bytes: by owner, of the last step.
    """

    def __init__(self, adapter: Adapter, optimizer: OptimizerConfig, *, scale: float) -> None:
        """`scale` is alpha; `optimizer.clip` other than `adapter` is left to the caller."""
        self.adapter = adapter
        self._scale = scale
        self._dtype = next(adapter.parameters()).dtype
        self._optimizer = build_optimizer(adapter.parameters(), optimizer)
        clips = optimizer.clip is ClipMode["adapter"]
        self._clip_norm = optimizer.clip_norm if clips else None
        self._is_finite: Tensor | None = None
        self.held_bytes = self._count_held()

    @property
    def has_gradient(self) -> bool:
        """Whether any data came since the last step."""
        return any(parameter.grad is not None for parameter in self.adapter.parameters())

    def accumulate(self, data: AdaptationData) -> None:
        """Adds one batch's gradient; the parameters are constant inside an interval."""
        gradients = adapter_gradients(self.adapter, data.to(self._dtype), self._scale)
        for name, parameter in self.adapter.named_parameters():
            if parameter.grad is None:
                parameter.grad = gradients[name]
            else:
                parameter.grad.add_(gradients[name])

    def gradient_norm(self, gradient_scale: float) -> Tensor:
        """Norm of the interval's gradient, a scalar; zero without data."""
        norms = [
            torch.linalg.vector_norm(parameter.grad)
            for parameter in self.adapter.parameters()
            if parameter.grad is not None
        ]
        if not norms:
            return torch.zeros((), dtype=self._dtype)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return gradient_scale * norm

    def step(self, fit: Fit, clip_factor: float | Tensor = 1.0) -> bool:
        """Optimises the adapter once and empties its gradient.

        Args:
            fit: rate and scale of this adaptation.
            clip_factor: factor of a clip across adapters.

        Returns:
            False if there was no data, and so no step.

        Raises:
            OffloadError: the gradient is not finite; the parameters are as before.
        """
        if not self.has_gradient:
            return False
        norm = self.gradient_norm(fit.gradient_scale)
        self._note_finite(torch.isfinite(norm), fit)
        factor = fit.gradient_scale * clip_factor
        if self._clip_norm is not None:
            factor = factor * (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self.adapter.parameters():
            # Most runs have one batch per interval and no clip: nothing to multiply.
            if parameter.grad is not None and not (isinstance(factor, float) and factor == 1.0):
                parameter.grad.mul_(factor)
        optimizer_step(self._optimizer, fit.learning_rate)
        self.held_bytes = self._count_held()
        self._optimizer.zero_grad(set_to_none=True)
        return True

    def _note_finite(self, is_finite: Tensor, fit: Fit) -> None:
        # A GPU is asked at logged steps only (check_finite); the CPU at once, before the step.
        self._is_finite = is_finite if self._is_finite is None else self._is_finite & is_finite
        if is_finite.device.type == "cpu":
            self.check_finite(fit.number)

    def check_finite(self, number: int) -> None:
        """Raises if a gradient was not finite up to this adaptation."""
        if self._is_finite is not None and not bool(self._is_finite):
            raise OffloadError(
                f"adaptation {number}: the hidden gradient of site {self.adapter.spec.name!r} is "
                "not finite: lower optimizer.lr, set optimizer.clip=adapter, or check the data"
            )

    def _count_held(self) -> dict[str, int]:
        """Bytes by owner: numbers, since others may ask while this worker changes the tensors."""
        gradients = [p.grad for p in self.adapter.parameters() if p.grad is not None]
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        moments = [value for value in state if isinstance(value, Tensor)]
        return {
            "adapters": count_bytes([*self.adapter.parameters(), *gradients]),
            "optimizer": count_bytes(moments),
        }

    def state_dict(self) -> dict[str, Any]:
        """Adapter, optimizer state and the gradient of an interval in progress."""
        gradients = {
            name: parameter.grad
            for name, parameter in self.adapter.named_parameters()
            if parameter.grad is not None
        }
        return {
            "adapter": dict(self.adapter.state_dict()),
            "optimizer": self._optimizer.state_dict()["state"],
            "gradient": gradients,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`; keys of the optimizer's state may have become strings."""
        self.adapter.load_state_dict(state["adapter"])
        groups = self._optimizer.state_dict()["param_groups"]
        moments = {int(index): copy.deepcopy(value) for index, value in state["optimizer"].items()}
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for name, parameter in self.adapter.named_parameters():
            gradient = state["gradient"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter, copy=True)
