"""How long a run is, and where on its way it is."""

import math
from dataclasses import dataclass, field

from cola.config.schema import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """Length of a run in steps (batches) and adaptations.

    Attributes:
        steps: T, from max_steps or else epochs.
        steps_per_epoch: batches of one pass over the training split.
        interval: I. The last interval may be partial and is fitted all the same.
    """

    steps: int
    steps_per_epoch: int
    interval: int

    @classmethod
    def of(cls, config: TrainerConfig, steps_per_epoch: int) -> "Horizon":
        """The horizon that a configuration means for this training split."""
        steps = config.max_steps or config.epochs * steps_per_epoch
        return cls(steps=steps, steps_per_epoch=steps_per_epoch, interval=config.interval)

    @property
    def adaptations(self) -> int:
        """ceil(T / I)."""
        return math.ceil(self.steps / self.interval)

    def closes_interval(self, step: int) -> bool:
        """Algorithm 1, line 12, or the end of the run."""
        return step % self.interval == 0 or step == self.steps


@dataclass
class Progression:
    """Where a run is; part of every checkpoint."""

    step: int = 0
    best_value: float = -math.inf
    best_step: int = 0
    best_users: list[str] | None = None  # who was scored then; None: not known
    seconds: float = 0.0  # wall time of training and evaluation in earlier sittings
    evaluation_seconds: float = 0.0  # over all sittings
    peaks_mib: dict[str, float] = field(default_factory=dict)  # of training, by device
    evaluation_peaks_mib: dict[str, float] = field(default_factory=dict)
    windows: list[dict[str, float]] = field(default_factory=list)  # costs between logged steps
