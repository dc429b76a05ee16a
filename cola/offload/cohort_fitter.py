"""The fit of one cohort at one site: users' gradients in one stack, each user's step its own."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cola.meters import count_bytes
from cola.offload.fit import Fit
from cola.runtime import upload
from cola.user_optimizers import UserOptimizer
from cola.user_stack import UserStack


class CohortFitter:
    """Gradients of an interval, and the step, of users whose adapters are stacked.

    Attributes:
        stack: their adapters at one site.
        taught: places of users with rows in the interval so far.
    """

    def __init__(
        self, stack: UserStack, optimizer: UserOptimizer | None, *, clip_norm: float | None
    ) -> None:
        """Takes over the stack.

        Args:
            stack: where it is fitted.
            optimizer: of the stack; None where users fit in processes of their own.
            clip_norm: largest norm of one adapter's gradient, if it is clipped.
        """
        self.stack = stack
        self.taught: set[int] = set()
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._gradients: dict[str, Tensor] = {}  # (K, ...)
        first = next(iter(stack.parameters()))
        self._dtype, self._device = first.dtype, first.device

    @property
    def is_local(self) -> bool:
        """Whether the users fit in processes of their own."""
        return self._optimizer is None

    def add(self, gradients: Mapping[str, Tensor], taught: Iterable[int]) -> None:
        """Adds one batch's gradients, (K, ...) by name, taken over; `taught` had rows in it."""
        self.taught |= set(taught)
        for name, gradient in gradients.items():
            before = self._gradients.get(name)
            own = gradient.to(self._dtype) if before is None else before.add_(gradient)
            self._gradients[name] = own

    def norms(self, fit: Fit) -> Tensor:
        """(K,) norm of each user's gradient, as it will be stepped before any clip."""
        if not self._gradients:
            return torch.zeros(self.stack.num_users, dtype=self._dtype, device=self._device)
        squares = [g.flatten(1).square().sum(dim=1) for g in self._gradients.values()]
        norms: Tensor = torch.stack(squares).sum(dim=0).sqrt()
        return norms * self._scales(fit)

    def step(self, fit: Fit, clip_factor: float | Tensor) -> Tensor:
        """Steps every user that was taught, and empties the gradients.

        A user whose gradient is not finite does not step on a CPU, and steps by nothing on a GPU,
        which is not waited for.

        Args:
            fit: rate and scales.
            clip_factor: of a clip across sites, (K,), or 1.

        Returns:
            (K,) users whose gradients were not finite.
        """
        norms = self.norms(fit)
        is_finite = norms.isfinite()
        users = sorted(self.taught)
        if self._device.type == "cpu":
            users = [user for user in users if is_finite[user]]
        factors = self._scales(fit) * clip_factor
        if self._clip_norm is not None:
            factors = factors * (self._clip_norm / (norms + 1e-6)).clamp(max=1.0)
        for gradient in self._gradients.values():
            shape = (-1, *[1] * (gradient.dim() - 1))
            if self._device.type != "cpu":
                gradient.masked_fill_(~is_finite.view(shape), 0.0)
            if not (isinstance(factors, float) and factors == 1.0):
                gradient.mul_(factors.view(shape) if isinstance(factors, Tensor) else factors)
        if self._optimizer is not None:
            self._optimizer.step(self._gradients, fit.learning_rate, users)
        self._gradients, self.taught = {}, set()
        return ~is_finite

    def forget(self, user: int) -> None:
        """Drops a user's gradients of the interval in progress."""
        self.taught.discard(user)
        for gradient in self._gradients.values():
            gradient[user] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Adapters, optimizer state and the gradients of an interval in progress."""
        return {
            "adapter": dict(self.stack.parameter_stacks()),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "gradients": dict(self._gradients),
            "taught": sorted(self.taught),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a copy of `state_dict`."""
        for name, stack in self.stack.parameter_stacks().items():
            stack.copy_(state["adapter"][name])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        self._gradients = {
            name: gradient.to(self._device, self._dtype, copy=True)
            for name, gradient in state["gradients"].items()
        }
        self.taught = set(state["taught"])

    def user_state(self, user: int) -> dict[str, Any]:
        """One user's adapter and optimizer state, copied."""
        state: dict[str, Any] = {"adapter": self.stack.member_state(user)}
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.user_state(user)
        return state

    def load_user_state(self, user: int, state: Mapping[str, Any]) -> None:
        """Gives one user what `user_state` gave; without an optimizer state, a fresh one."""
        self.stack.load_member(user, state["adapter"])
        if self._optimizer is not None:
            self._optimizer.load_user_state(user, state.get("optimizer"))

    def held_bytes(self) -> dict[str, int]:
        """By owner."""
        tensors = [*self.stack.parameter_stacks().values(), *self._gradients.values()]
        moments = 0 if self._optimizer is None else self._optimizer.num_bytes
        return {"adapters": count_bytes(tensors), "optimizer": moments}

    def _scales(self, fit: Fit) -> float | Tensor:
        if fit.user_scales is None:
            return fit.gradient_scale
        own = fit.user_scales[self.stack.first : self.stack.last]
        return upload(torch.tensor(own, dtype=self._dtype), self._device)
