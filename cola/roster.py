"""The users of a run: who takes part, whose rows are under way, and who had to stop.

One object is shared by all adapters of a run, by the learner and by the workers that fit: it is the
only thing about users that changes while training.
"""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cola.config.choices import AdapterKind, OptimizerName, Reduction
from cola.config.user_settings import UserSettings
from cola.user_rows import UserId, UserRows


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Users first <= position < last whose adapters have one structure and one optimizer."""

    first: int
    last: int
    kind: AdapterKind
    optimizer: OptimizerName


class Roster:
    """Users in the run's order and what is true of them now.

    Attributes:
        settings: of each user, K of them.
        rows: whose rows the base model's pass under way has; None outside of one.
    """

    def __init__(self, settings: Sequence[UserSettings], *, reduction: Reduction) -> None:
        """`reduction` combines the users' delta weights in a merge."""
        self.settings = tuple(settings)
        self.rows: UserRows | None = None
        self._reduction = reduction
        self._positions = {user.name: index for index, user in enumerate(self.settings)}
        self._absent: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._stopped: dict[int, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Roster":
        return self  # a copy of an adapter belongs to the same users

    def __len__(self) -> int:
        return len(self.settings)

    @property
    def names(self) -> tuple[UserId, ...]:
        """Names in the run's order."""
        return tuple(user.name for user in self.settings)

    @property
    def absent(self) -> frozenset[int]:
        """Positions of users that take no part now."""
        return self._absent

    @property
    def present(self) -> frozenset[int]:
        """Positions of users that take part."""
        return frozenset(range(len(self))) - self._absent

    def position(self, user: UserId) -> int:
        """Where a user stands."""
        return self._positions[user]

    def set_absent(self, users: frozenset[int]) -> None:
        """Changes who takes part; nothing may be under way."""
        self._absent = users

    def cohorts(self) -> list[Cohort]:
        """Neighbours that are fitted together."""
        cohorts = []
        for _, group in itertools.groupby(
            range(len(self)), key=lambda position: self.settings[position].cohort
        ):
            members = list(group)
            one = self.settings[members[0]]
            cohorts.append(
                Cohort(
                    first=members[0],
                    last=members[-1] + 1,
                    kind=one.kind,
                    optimizer=one.optimizer,
                )
            )
        return cohorts

    def shares(self) -> Tensor:
        """(K,) factor of each user's delta weight in a merge: alpha, and 1/K for the mean.

        Users that take no part have none, and do not count in K.
        """
        present = self.present
        count = len(present) if self._reduction is Reduction.mean else 1
        factors = [
            user.alpha / max(count, 1) if index in present else 0.0
            for index, user in enumerate(self.settings)
        ]
        return torch.tensor(factors, dtype=torch.float64)

    def stop(self, user: int, reason: str) -> None:
        """Notes that a user cannot go on; callable from any thread, effective at the next step."""
        with self._lock:
            self._stopped.setdefault(user, reason)

    @property
    def has_stopped(self) -> bool:
        """Whether somebody had to stop since this was last taken note of."""
        return bool(self._stopped)

    def take_stopped(self) -> dict[int, str]:
        """Users that had to stop since this was last asked, and why."""
        with self._lock:
            stopped, self._stopped = self._stopped, {}
        return {user: why for user, why in stopped.items() if user not in self._absent}
