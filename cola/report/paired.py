"""Paired comparison of two methods over tasks and seeds: how far apart, how sure, on par or not.

Pure functions over plain numbers. A pair is two scores of one task and one seed. Seeds of a task
share its data and its validation rows, so pairs of different tasks are never thrown together:
differences are averaged inside a task first, and tasks are compared by those averages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cola.errors import DataError
from cola.report.difference import (
    Difference,
    over_seeds,
    over_tasks_like_these,
    over_these_tasks,
)
from cola.report.text import format_table

Pair = tuple[str, int]
"""Task and seed of a score."""

MIN_SEEDS = 2
MAX_LISTED = 6

LEGEND = """\
Differences are paired by task and seed; n counts seeds, then pairs, then tasks. Brackets hold the
{confidence:g} % interval; p is that of two one-sided tests for a difference of {margin:g} points
or more: on par where it is below {level:g}, else higher or lower where the interval leaves out
zero, else undecided. "These tasks" asks about new seeds on the same tasks, "tasks like these" about
new tasks, too. Seeds of a task share its validation rows."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two methods on all tasks that both were run on.

    Attributes:
        by_task: difference of every task over its seeds.
        these_tasks: mean over tasks, for new seeds on the same tasks; None for a single task.
        tasks_like_these: the same mean, for new tasks of the kind, too; None for a single task.
    """

    by_task: dict[str, Difference]
    these_tasks: Difference | None
    tasks_like_these: Difference | None


def compare(first: Mapping[Pair, float], second: Mapping[Pair, float]) -> Comparison:
    """Compares two methods by their scores.

    Args:
        first: score of every (task, seed) of one method, higher is better.
        second: of the other, for the same tasks and seeds.

    Raises:
        DataError: a pair is missing, a score is not finite, or a task has fewer than two seeds.
    """
    _check(first, second)
    tasks = list(dict.fromkeys(task for task, _ in first))
    by_task = {
        task: over_seeds([first[pair] - second[pair] for pair in first if pair[0] == task])
        for task in tasks
    }
    several = len(tasks) > 1
    return Comparison(
        by_task=by_task,
        these_tasks=over_these_tasks(by_task.values()) if several else None,
        tasks_like_these=over_tasks_like_these(by_task.values()) if several else None,
    )


def paired_rows(
    comparison: Comparison, *, margin: float, confidence: float = 0.95, factor: float = 100.0
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a comparison's table: a line per task, then those over tasks.

    Args:
        comparison: from `compare`.
        margin: differences below it do not matter, in the unit of the scores (0.01: a point).
        confidence: of the intervals; 1 - confidence is the level of the verdicts.
        factor: by which scores are shown; 100 shows shares as points.
    """
    header = ["task", "n", "difference, points", f"{100 * confidence:g} % interval",
              f"p, beyond {factor * margin:g}", "verdict"]  # fmt: skip
    lines = dict(comparison.by_task)
    if comparison.these_tasks is not None and comparison.tasks_like_these is not None:
        lines["these tasks"] = comparison.these_tasks
        lines["tasks like these"] = comparison.tasks_like_these
    rows = []
    for name, difference in lines.items():
        low, high = difference.interval(confidence)
        rows.append(
            [
                name,
                str(difference.num),
                _signed(factor * difference.mean),
                f"[{_signed(factor * low)}, {_signed(factor * high)}]",
                f"{difference.equivalence_p(margin):.3f}",
                difference.verdict(margin, confidence).value,
            ]
        )
    return header, rows


def paired_table(
    comparison: Comparison,
    first: str,
    second: str,
    *,
    margin: float,
    confidence: float = 0.95,
    factor: float = 100.0,
) -> str:
    """The comparison as Markdown: a title that names both methods, the table and a legend.

    See `paired_rows` for the rest of the arguments.
    """
    header, rows = paired_rows(comparison, margin=margin, confidence=confidence, factor=factor)
    legend = LEGEND.format(
        confidence=100 * confidence, margin=factor * margin, level=round(1 - confidence, 6)
    )
    return f"**{first} minus {second}**\n\n{format_table(header, rows)}\n\n{legend}"


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def _check(first: Mapping[Pair, float], second: Mapping[Pair, float]) -> None:
    """Refuses what cannot be paired."""
    lonely = sorted(first.keys() ^ second.keys())
    if lonely:
        sides = [f"{task} seed {seed} ({_owner((task, seed), first)})" for task, seed in lonely]
        raise DataError(
            f"scores without a partner: {_listed(sides)}; run the other method there, too, or "
            "leave them out"
        )
    if not first:
        raise DataError("no scores to compare: give the same tasks and seeds of two methods")
    broken = sorted(
        pair for pair in first if not (math.isfinite(first[pair]) and math.isfinite(second[pair]))
    )
    if broken:
        places = _listed([f"{task} seed {seed}" for task, seed in broken])
        raise DataError(f"scores that are no finite number: {places}; leave them out, or run again")
    tasks = [task for task, _ in first]
    few = [task for task in dict.fromkeys(tasks) if tasks.count(task) < MIN_SEEDS]
    if few:
        raise DataError(
            f"a single seed of {_listed(few)}: one pair says nothing about the spread; run at "
            f"least {MIN_SEEDS} seeds of every task (seed=0,1,2)"
        )


def _owner(pair: Pair, first: Mapping[Pair, float]) -> str:
    return "first only" if pair in first else "second only"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
