"""How often 95 % intervals of a mean over tasks hold the truth: t, and two ways to bootstrap.

    python scripts/interval_coverage.py

Differences of two methods are normal over tasks and over seeds, with equal spread and mean zero.
"""

import sys

import numpy as np
from numpy.typing import NDArray
from scipy import stats

EXPERIMENTS, RESAMPLES, SEEDS = 2000, 500, 3
Array = NDArray[np.float64]


def main() -> int:
    """Prints the three shares for five and for eight tasks."""
    generator = np.random.default_rng(0)
    for num_tasks in (5, 8):
        found = [f"{100 * share:.1f} %" for share in coverage(num_tasks, generator)]
        print(f"{num_tasks} tasks: t {found[0]}, tasks {found[1]}, tasks then seeds {found[2]}")
    return 0


def coverage(num_tasks: int, generator: np.random.Generator) -> tuple[float, float, float]:
    """Shares of experiments whose interval holds zero."""
    shape = (EXPERIMENTS, num_tasks)
    scores = generator.normal(size=(*shape, 1)) + generator.normal(size=(*shape, SEEDS))
    means = scores.mean(axis=2)
    spread = means.std(axis=1, ddof=1) / num_tasks**0.5
    half = stats.t.ppf(0.975, num_tasks - 1) * spread
    tasks, both = (np.empty((EXPERIMENTS, RESAMPLES)) for _ in range(2))
    for index in range(RESAMPLES):
        chosen = generator.integers(num_tasks, size=shape)
        tasks[:, index] = np.take_along_axis(means, chosen, axis=1).mean(axis=1)
        own = np.take_along_axis(scores, chosen[..., None], axis=1)
        seeds = generator.integers(SEEDS, size=own.shape)
        both[:, index] = np.take_along_axis(own, seeds, axis=2).mean(axis=(1, 2))
    return float(np.mean(abs(means.mean(axis=1)) <= half)), _holds(tasks), _holds(both)


def _holds(resampled: Array) -> float:
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    return float(np.mean((low <= 0) & (high >= 0)))


if __name__ == "__main__":
    sys.exit(main())
