"""The fit of one cohort: users' gradients in one stack a site, each user's step its own."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cola.meters import count_bytes
from cola.offload.fit import Fit
from cola.runtime import upload
from cola.user_optimizers import UserOptimizer
from cola.user_stack import UserStack
from cola.user_steps import UserStep, step_together


class CohortFitter:
    """Gradients of an interval, and the step, of users whose adapters are stacked.

    Attributes:
        stack: their adapters at one site.
        taught: places of users with rows in the interval so far.
        optimizer: of the stack; None where users fit in processes of their own.
        clip_norm: largest norm of one adapter's gradient, if it is clipped.
    """

    def __init__(
        self, stack: UserStack, optimizer: UserOptimizer | None, *, clip_norm: float | None
    ) -> None:
        """Takes over the stack, where it is fitted."""
        self.stack = stack
        self.taught: set[int] = set()
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self._gradients: dict[str, Tensor] = {}  # (K, ...)
        first = next(iter(stack.parameters()))
        self._dtype, self._device = first.dtype, first.device

    @property
    def is_local(self) -> bool:
        """Whether the users fit in processes of their own."""
        return self.optimizer is None

    def add(self, gradients: Mapping[str, Tensor], taught: Iterable[int]) -> None:
        """Adds one batch's gradients, (K, ...) by name, taken over; `taught` had rows in it."""
        self.taught |= set(taught)
        for name, gradient in gradients.items():
            before = self._gradients.get(name)
            own = gradient.to(self._dtype) if before is None else before.add_(gradient)
            self._gradients[name] = own

    def norms(self) -> Tensor:
        """(K,) norm of each user's gradient so far."""
        if not self._gradients:
            return torch.zeros(self.stack.num_users, dtype=self._dtype, device=self._device)
        parts = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in self._gradients.values()]
        norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return norms

    def scales(self, fit: Fit) -> float | Tensor:
        """Of the gradients that are stepped: of all users, or (K,)."""
        if fit.user_scales is None:
            return fit.gradient_scale
        own = fit.user_scales[self.stack.first : self.stack.last]
        return upload(torch.tensor(own, dtype=self._dtype), self._device)

    def forget(self, user: int) -> None:
        """Drops a user's gradients of the interval in progress."""
        self.taught.discard(user)
        for gradient in self._gradients.values():
            gradient[user] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Adapters, optimizer state and the gradients of an interval in progress."""
        return {
            "adapter": dict(self.stack.parameter_stacks()),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "gradients": dict(self._gradients),
            "taught": sorted(self.taught),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a copy of `state_dict`."""
        for name, stack in self.stack.parameter_stacks().items():
            stack.copy_(state["adapter"][name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self._gradients = {
            name: gradient.to(self._device, self._dtype, copy=True)
            for name, gradient in state["gradients"].items()
        }
        self.taught = set(state["taught"])

    def user_state(self, user: int) -> dict[str, Any]:
        """One user's adapter and optimizer state, copied."""
        state: dict[str, Any] = {"adapter": self.stack.member_state(user)}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.user_state(user)
        return state

    def load_user_state(self, user: int, state: Mapping[str, Any]) -> None:
        """Gives one user what `user_state` gave; without an optimizer state, a fresh one."""
        self.stack.load_member(user, state["adapter"])
        if self.optimizer is not None:
            self.optimizer.load_user_state(user, state.get("optimizer"))

    def held_bytes(self) -> dict[str, int]:
        """By owner."""
        tensors = [*self.stack.parameter_stacks().values(), *self._gradients.values()]
        moments = 0 if self.optimizer is None else self.optimizer.num_bytes
        return {"adapters": count_bytes(tensors), "optimizer": moments}

    def _take(self) -> tuple[dict[str, Tensor], set[int]]:
        """Gradients and who was taught, which are emptied."""
        gradients, taught = self._gradients, self.taught
        self._gradients, self.taught = {}, set()
        return gradients, taught


@torch.no_grad()
def step_cohorts(
    cohorts: Sequence[CohortFitter], fit: Fit, clip_factor: float | Tensor
) -> Tensor | None:
    """Steps every user that was taught, at several sites, and empties the gradients.

    A user whose gradient at a site is not finite does not step there on a CPU, and steps by nothing
    on a GPU, which is not waited for.

    Args:
        cohorts: of the same users at S sites.
        fit: rate and scales.
        clip_factor: of a clip across sites, (K,), or 1.

    Returns:
        (S, K) whose gradients were not finite; None: nobody's, as far as a host can tell.
    """
    first = cohorts[0]
    norms = torch.stack([cohort.norms() for cohort in cohorts])  # (S, K)
    on_host = norms.device.type == "cpu"
    # Two calls where all is well; `isfinite` of a tensor is six.
    broken = None if on_host and math.isfinite(norms.max()) else ~norms.isfinite()
    scales = first.scales(fit)
    factors = scales * clip_factor
    if first.clip_norm is not None:
        factors = factors * (first.clip_norm / (scales * norms + 1e-6)).clamp(max=1.0)
    taken = [cohort._take() for cohort in cohorts]
    if broken is not None and not on_host:
        for own, (gradients, _) in zip(broken, taken, strict=True):
            for gradient in gradients.values():
                gradient.masked_fill_(_by_user(own, gradient), 0.0)
    _multiply([list(gradients.values()) for gradients, _ in taken], factors)
    steps = []
    for index, (cohort, (gradients, taught)) in enumerate(zip(cohorts, taken, strict=True)):
        if broken is not None and on_host:
            taught = taught.difference(broken[index].nonzero().flatten().tolist())
        if cohort.optimizer is not None:
            steps.append(UserStep(cohort.optimizer, gradients, sorted(taught)))
    step_together(steps, fit.learning_rate)
    return broken


def _multiply(gradients: Sequence[Sequence[Tensor]], factors: float | Tensor) -> None:
    """Gradients (K, ...) of S sites, in place, by one factor, or (K,) or (S, K) of them."""
    if not isinstance(factors, Tensor):
        if factors != 1.0:
            torch._foreach_mul_([gradient for own in gradients for gradient in own], factors)
        return
    for own, factor in zip(gradients, factors.expand(len(gradients), -1), strict=True):
        for gradient in own:
            gradient.mul_(_by_user(factor, gradient))


def _by_user(values: Tensor, like: Tensor) -> Tensor:
    """(K,) as a factor of (K, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))
