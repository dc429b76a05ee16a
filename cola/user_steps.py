"""Steps of users' stacked parameters at many sites, by few kernels.

A kernel takes a host several calls, and adapters of users are many and small.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cola.user_optimizers import UserOptimizer


class UserStep(NamedTuple):
    """One step of some users of one optimizer; the others' state stays as it is.

    Attributes:
        optimizer: whose.
        gradients: (K, ...) by name, not changed; those of absent users are not used.
        users: positions of those who step, ascending.
    """

    optimizer: UserOptimizer
    gradients: Mapping[str, Tensor]
    users: Sequence[int]


@torch.no_grad()
def step_together(steps: Sequence[UserStep], learning_rate: float) -> None:
    """Steps of optimizers of one configuration, by few kernels: one where all users are in step.

    Args:
        steps: of the same users at several sites.
        learning_rate: gamma_t, times each user's factor.
    """
    found: dict[tuple[object, ...], _Slices] = {}
    calls: dict[float, _KernelCall] = {}
    steps = [step for step in steps if step.users]
    for optimizer, gradients, users in steps:
        pace = optimizer.pace()
        key = (tuple(users), *pace)
        if key not in found:
            found[key] = _Slices(users, *pace)
        stacks = optimizer.begin(gradients)
        for rate, runs in found[key].by_rate.items():
            call = calls.setdefault(rate, _KernelCall([[] for _ in stacks], []))
            places = [place for place, _ in runs]
            for own, stack in zip(call.tensors, stacks, strict=True):
                own += found[key].cut(stack, places)
            call.counts.extend([float(count) for _, count in runs] * len(stacks[0]))
    for rate, call in calls.items():
        steps[0].optimizer.call_kernel(call.tensors, learning_rate * rate, call.counts)
    for optimizer, _, users in steps:
        optimizer.count(users)


class _KernelCall(NamedTuple):
    """Slices of one rate: what `call_kernel` takes."""

    tensors: list[list[Tensor]]
    counts: list[float]


class _Slices:
    """Runs of neighbours who all step, with one rate factor and one count.

    Attributes:
        by_rate: for every rate factor, its runs' places and counts.
    """

    def __init__(self, users: Iterable[int], rates: Sequence[float], counts: Sequence[int]) -> None:
        """`users` ascending, of K with rates and counts each."""
        self.by_rate: dict[float, list[tuple[int, int]]] = {}
        self._sizes: list[int] = []  # of a gap, a run, a gap, ...
        end, before = 0, None
        for user in users:
            own = (rates[user], counts[user])
            if user == end and own == before:
                self._sizes[-1] += 1
            else:
                self._sizes += [user - end, 1]
                self.by_rate.setdefault(own[0], []).append((len(self._sizes) - 1, own[1]))
            end, before = user + 1, own
        self._sizes.append(len(rates) - end)

    def cut(self, stacks: Iterable[Tensor], places: Sequence[int]) -> list[Tensor]:
        """The runs at some places of every stack (K, ...), as views."""
        if len(self._sizes) == 3 and not self._sizes[0] and not self._sizes[2]:
            return list(stacks)  # everyone is one run
        parts = [stack.split_with_sizes(self._sizes) for stack in stacks]
        return [part[place] for part in parts for place in places]
