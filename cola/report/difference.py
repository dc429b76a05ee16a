"""A mean difference with its uncertainty: intervals, and whether it is small enough not to matter.

Differences of one task over seeds come first; tasks are then compared by their means.
`cola.report.paired` makes them of scores, docs/statistics.md says how to read them.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What a comparison supports."""

    on_par = "on par"  # within the margin
    higher = "higher"
    lower = "lower"
    undecided = "undecided"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference with its uncertainty, in the unit of the scores.

    Attributes:
        mean: first method minus second.
        standard_error: of the mean; 0 where all differences are equal.
        degrees_of_freedom: of the t distribution that (mean - truth) / standard_error follows.
        num: differences that were averaged.
    """

    mean: float
    standard_error: float
    degrees_of_freedom: float
    num: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Both ends: mean -+ t((1 + confidence) / 2, df) * standard_error."""
        from scipy.stats import t

        half = float(t.ppf((1 + confidence) / 2, self.degrees_of_freedom)) * self.standard_error
        return self.mean - half, self.mean + half

    def equivalence_p(self, margin: float) -> float:
        """The p value of "the true difference is at least the margin, one way or the other".

        Two one-sided t tests, the larger p of the two: P(T > (margin - |mean|) / standard_error).
        Below the level a, the 1 - 2a interval lies inside (-margin, margin), and the reverse.
        Source: Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987) 657-680.

        Raises:
            ValueError: the margin is not positive.
        """
        from scipy.stats import t

        if not margin > 0:
            raise ValueError(f"margin={margin}: give a positive one, in the unit of the scores")
        distance = margin - abs(self.mean)
        if self.standard_error == 0:
            return 0.0 if distance > 0 else 1.0
        return float(t.sf(distance / self.standard_error, self.degrees_of_freedom))

    def verdict(self, margin: float, confidence: float = 0.95) -> Verdict:
        """On par if that is shown at level 1 - confidence, else whether the interval shows a sign.

        Both may hold: a difference that is certain but smaller than the margin counts as on par.
        """
        if self.equivalence_p(margin) < 1 - confidence:
            return Verdict.on_par
        low, high = self.interval(confidence)
        if low > 0:
            return Verdict.higher
        return Verdict.lower if high < 0 else Verdict.undecided


def over_seeds(differences: Sequence[float]) -> Difference:
    """The paired t estimate of one task: mean d, standard error s / sqrt(n), n - 1 degrees.

    Args:
        differences: of every seed; two at least.
    """
    return Difference(
        mean=statistics.fmean(differences),
        standard_error=statistics.stdev(differences) / math.sqrt(len(differences)),
        degrees_of_freedom=len(differences) - 1,
        num=len(differences),
    )


def over_these_tasks(tasks: Iterable[Difference]) -> Difference:
    """Mean over T tasks that are fixed: only seeds are random, and tasks may vary unequally.

    With v_t the squared standard error of task t and n_t its seeds: standard error
    sqrt(sum v_t) / T, degrees of freedom (sum v_t)^2 / sum(v_t^2 / (n_t - 1)).
    Source: Welch, Biometrika 34 (1947) 28-35; Satterthwaite, Biometrics Bull. 2 (1946) 110-114.
    """
    found = list(tasks)
    variances = [task.standard_error**2 for task in found]
    total = sum(variances)
    weights = sum(v**2 / t.degrees_of_freedom for v, t in zip(variances, found, strict=True))
    return Difference(
        mean=statistics.fmean(task.mean for task in found),
        standard_error=math.sqrt(total) / len(found),
        # Without any spread the degrees do not matter; a sum of those of the tasks is defined.
        degrees_of_freedom=total**2 / weights if weights else sum(t.num - 1 for t in found),
        num=sum(task.num for task in found),
    )


def over_tasks_like_these(tasks: Iterable[Difference]) -> Difference:
    """Mean over T tasks that stand for others: the t estimate over the tasks' means, T - 1 degrees.

    In the model d = mu + task + noise with equal numbers of seeds this is what the mixed model
    gives: the spread of the means holds the noise of the seeds already, divided by their number.
    A bootstrap over so few tasks gives intervals that are too narrow (Cameron, Gelbach and Miller,
    Rev. Econ. Stat. 90 (2008) 414-427).
    """
    return over_seeds([task.mean for task in tasks])
