"""Figures of many runs over steps and intervals: learning curves and the interval ablation.

Paper: Figures 4 to 11, and the learning curves of its appendix.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from cola.report.matching import Match
from cola.report.runs import COLA, Run, of_one_variant
from cola.report.style import (
    GREY,
    SeriesStyle,
    add_legend,
    cycle_styles,
    method_styles,
    new_figure,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENT = 100
_NUM_MARKERS = 8  # along a curve


@dataclass(frozen=True, kw_only=True)
class NamedFigure:
    """A figure and what is said about it.

    Attributes:
        name: of its file.
        title: what it shows.
        caption: how to read it.
        figure: of matplotlib.
    """

    name: str
    title: str
    caption: str
    figure: "Figure"


def learning_curves(runs: Iterable[Run]) -> list[NamedFigure]:
    """A figure for each task, model and way of training, with a line for every method."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.subject, run.length, run.batch_size), []).append(run)
    found = []
    for (subject, length, batch_size), own in groups.items():
        series = by_label(own, _curve_label)
        points = {label: [run.curve() for run in some] for label, some in series.items()}
        points = {label: curves for label, curves in points.items() if _has_line(curves)}
        if points:
            conditions = str(length) + (f", batch size {batch_size}" if batch_size else "")
            found.append(
                NamedFigure(
                    name=f"curves_{file_name(f'{subject} {conditions}')}",
                    title=f"Learning curves: {subject}",
                    caption=f"{conditions}. Mean over seeds, band: standard deviation."
                    + undrawn(own, series),
                    figure=_draw_curves(points, f"{own[0].metric} on the selection split, %"),
                )
            )
    return found


def _curve_label(run: Run) -> str:
    return run.label if run.interval == 1 else f"{run.label}, I = {run.interval}"


def by_label(runs: Sequence[Run], name: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Runs of every label that may be averaged: of one variant, each seed once."""
    labels = dict.fromkeys(map(name, runs))
    return {label: of_one_variant(r for r in runs if name(r) == label) for label in labels}


def undrawn(runs: Sequence[Run], series: Mapping[str, Sequence[Run]]) -> str:
    """A sentence about runs that stand in no series; empty if there are none."""
    count = len(runs) - sum(map(len, series.values()))
    return f" Runs with other settings are not drawn: {count}." if count else ""


def _has_line(curves: Sequence[Sequence[tuple[int, float]]]) -> bool:
    return all(len(curve) > 1 for curve in curves)


def _draw_curves(points: Mapping[str, Sequence[Sequence[tuple[int, float]]]], y: str) -> "Figure":
    figure = new_figure(8.5, 4.2)
    axes = figure.add_subplot()
    axes.set(xlabel="step (batches)", ylabel=y)
    for label, style in method_styles(list(points)).items():
        values = [dict(curve) for curve in points[label]]
        steps = sorted(set.intersection(*(set(one) for one in values)))
        scores = [[PERCENT * one[step] for one in values] for step in steps]
        _line(axes, steps, scores, label, style)
        _band(axes, steps, scores, style)
    _finish(figure, axes)
    return figure


def _line(
    axes: Any, places: Sequence[int], scores: Sequence[Sequence[float]], label: str, s: SeriesStyle
) -> None:
    axes.plot(
        places,
        list(map(statistics.fmean, scores)),
        color=s.colour,
        linestyle=s.line,
        marker=s.marker,
        markevery=max(1, len(places) // _NUM_MARKERS),
        markersize=s.size,
        markerfacecolor=s.face,
        linewidth=1.4,
        label=label,
    )


def _band(
    axes: Any, places: Sequence[int], scores: Sequence[Sequence[float]], style: SeriesStyle
) -> None:
    if min(map(len, scores)) < 2:
        return
    means, spreads = list(map(statistics.fmean, scores)), list(map(statistics.stdev, scores))
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(places, low, high, color=style.colour, alpha=0.15, linewidth=0)


def _finish(figure: "Figure", axes: Any) -> None:
    """What all figures of lines share."""
    plain(axes)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    add_legend(figure)


def interval_figures(matches: Iterable[Match], others: Iterable[Run]) -> list[NamedFigure]:
    """Score against the interval I: the paper's figures, and one of all other runs that allow it.

    Args:
        matches: runs with a row in the grid; those of the interval ablation are drawn.
        others: runs without.
    """
    ablation = [match for match in matches if match.row.shown_in[0].startswith("figure")]
    ablation.sort(key=lambda match: int(match.row.shown_in[0].removeprefix("figure")))
    found = []
    for name, group in groupby(ablation, key=lambda match: match.row.shown_in[0]):
        own = list(group)
        stand_ins = sorted({match.stand_in for match in own if match.stand_in})
        title = f"Figure {name.removeprefix('figure')}: adaptation interval"
        if stand_ins:
            title += f" (STAND-IN: {'; '.join(stand_ins)})"
        found += _interval_figure(name, title, [match.run for match in own])
    return found + _interval_figure("intervals", "Adaptation interval, other runs", others)


def _interval_figure(name: str, title: str, runs: Iterable[Run]) -> list[NamedFigure]:
    lines: dict[str, dict[int, list[float]]] = {}
    for label, own in _interval_series(runs).items():
        intervals = sorted({run.interval for run in own})
        if len(intervals) > 1:
            lines[label] = {
                i: [
                    PERCENT * run.score for run in of_one_variant(r for r in own if r.interval == i)
                ]
                for i in intervals
            }
    if not lines:
        return []
    figure = new_figure(8.5, 4.2)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set(xlabel="adaptation interval I (batches per adaptation)", ylabel="score, %")
    for label, style in cycle_styles(list(lines)).items():
        scores = list(lines[label].values())
        _line(axes, list(lines[label]), scores, label, style)
        _band(axes, list(lines[label]), scores, style)
    ticks = sorted({interval for line in lines.values() for interval in line})
    axes.set_xticks(ticks, labels=list(map(str, ticks)))
    axes.minorticks_off()
    _finish(figure, axes)
    caption = "Mean over seeds, band: standard deviation. Batches of one size for all intervals."
    return [NamedFigure(name=name, title=title, caption=caption, figure=figure)]


def _interval_series(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of gradient learning that differ in the interval, by what they share."""
    series: dict[str, list[Run]] = {}
    for run in runs:
        if run.method == COLA:
            label = (
                f"{run.subject}\n{run.label}, {run.metric}\n{run.length}, batch {run.batch_size}"
            )
            series.setdefault(label, []).append(run)
    return series


def file_name(words: str) -> str:
    """Words as part of a file's name."""
    return "_".join("".join(c if c.isalnum() else " " for c in words.lower()).split())
