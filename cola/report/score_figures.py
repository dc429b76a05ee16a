"""Figures of scores: against the base device's memory, and user by user."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cola.report.curve_figures import PERCENT, NamedFigure, by_label, file_name, undrawn
from cola.report.runs import ONE_USER, Run
from cola.report.style import (
    CYCLE,
    GREY,
    HATCHES,
    INK,
    add_legend,
    method_styles,
    new_figure,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_USERS = 16
"""Users of one figure; of more, the first ones are drawn."""

_SHARING = ("joint", "alone", "collaboration")
_ON_CPU = "held on the CPU: base model, adapters, optimizer, staging; MiB"
_ON_GPU = "peak memory of the base device while training, MiB"


def memory_figures(runs: Iterable[Run]) -> list[NamedFigure]:
    """Score against memory, each method a point; one figure for each task, model and device."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        if run.users == ONE_USER and run.interval == 1:
            key = (run.subject, run.length, run.batch_size, _base_device(run) == "cpu")
            groups.setdefault(key, []).append(run)
    found = []
    for (subject, length, batch_size, on_cpu), own in groups.items():
        series = by_label(own, _placed_label)
        if len(series) < 2:
            continue
        conditions = str(length) + (f", batch size {batch_size}" if batch_size else "")
        device = "cpu" if on_cpu else "gpu"
        found.append(
            NamedFigure(
                name=f"memory_{device}_{file_name(f'{subject} {conditions}')}",
                title=f"Accuracy against memory: {subject}",
                caption=f"{conditions}. Means over seeds, bars: standard deviation of the score."
                + undrawn(own, series),
                figure=_draw_memory(series, _ON_CPU if on_cpu else _ON_GPU),
            )
        )
    return found


def _placed_label(run: Run) -> str:
    """The method, and where its adapters are fitted if not beside the base model."""
    offload = run.summary["offload"]
    return run.label if offload in (None, "none") else f"{run.label}, fits on {offload}"


def _base_device(run: Run) -> str:
    """The device that the base model was on: the run's, or the first GPU it used."""
    peaks = run.summary["peak_mib"]
    device = str(run.settings.get("device", "auto"))
    return device if device in peaks else min((d for d in peaks if d != "cpu"), default="cpu")


def _draw_memory(series: Mapping[str, Sequence[Run]], x: str) -> "Figure":
    figure = new_figure(8.5, 4.2)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=f"{next(iter(series.values()))[0].metric}, %")
    for label, style in method_styles(list(series)).items():
        scores = [PERCENT * run.score for run in series[label]]
        memory = [run.summary["peak_mib"][_base_device(run)] for run in series[label]]
        axes.errorbar(
            statistics.fmean(memory),
            statistics.fmean(scores),
            yerr=statistics.stdev(scores) if len(scores) > 1 else None,
            color=style.colour,
            marker=style.marker,
            linestyle="none",
            markersize=1.5 * style.size,
            markerfacecolor=style.face,
            capsize=3,
            label=label,
        )
    axes.margins(x=0.1, y=0.15)
    axes.set_xlim(0, 1.06 * axes.get_xlim()[1])
    plain(axes)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    add_legend(figure)
    return figure


def user_figures(runs: Iterable[Run]) -> list[NamedFigure]:
    """Bars for every user, one for each way of sharing; one figure for each task and model."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.users != ONE_USER and run.summary["result"].get("by_user"):
            groups.setdefault((run.subject, run.length), []).append(run)
    found = []
    for (subject, length), own in groups.items():
        own.sort(key=lambda run: (_SHARING.index(run.users), run.label))
        series = by_label(own, lambda run: run.label)
        found.append(
            NamedFigure(
                name=f"users_{file_name(f'{subject} {length}')}",
                title=f"Score of every user: {subject}",
                caption=f"{length}. Means over seeds, lines: standard deviation."
                + undrawn(own, series),
                figure=_draw_users(series),
            )
        )
    return found


def _draw_users(series: Mapping[str, Sequence[Run]]) -> "Figure":
    runs = [run for own in series.values() for run in own]
    users = list(dict.fromkeys(u for run in runs for u in run.summary["result"]["by_user"]))
    users = users[:MAX_USERS]
    figure = new_figure(max(8.5, 0.5 + 0.16 * len(users) * (len(series) + 1)), 4.6)
    axes = figure.add_subplot()
    width = 0.85 / len(series)
    for i, (label, own) in enumerate(series.items()):
        scores = [_user_scores(own, user) for user in users]
        axes.bar(
            [place + (i - (len(series) - 1) / 2) * width for place in range(len(users))],
            [statistics.fmean(some) if some else 0 for some in scores],
            width,
            yerr=_spreads(scores),
            color=CYCLE[i % len(CYCLE)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white",
            linewidth=0,
            error_kw={"ecolor": INK, "elinewidth": 0.9},
            label=label,
        )
    names = [user.replace("_", " ") for user in users]
    axes.set_xticks(range(len(users)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set(ylabel=f"{runs[0].metric}, %")
    plain(axes)
    add_legend(figure)
    return figure


def _user_scores(runs: Sequence[Run], user: str) -> list[float]:
    by_user: list[Mapping[str, Any]] = [run.summary["result"]["by_user"] for run in runs]
    pairs = zip(runs, by_user, strict=True)
    return [PERCENT * scores[user][run.metric] for run, scores in pairs if user in scores]


def _spreads(scores: Sequence[Sequence[float]]) -> list[float] | None:
    if all(len(some) < 2 for some in scores):
        return None
    return [statistics.stdev(some) if len(some) > 1 else 0.0 for some in scores]
