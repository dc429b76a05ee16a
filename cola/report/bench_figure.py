"""Memory and time of every row of a computation table as bars."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola.report.style import BLUE, GREEN, GREY, INK, SKY, VERMILION, new_figure, plain, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By who computes the adapters' gradients, and where: colour and hatch.
_LOOKS = {
    "floor": (GREY, ""),
    "back-propagation": (BLUE, "///"),
    "ColA on the base device": (SKY, "..."),
    "ColA on the CPU": (VERMILION, ""),
    "ColA on another GPU": (GREEN, "xxx"),
}
_OF_OFFLOAD = {
    "none": "ColA on the base device",
    "cpu": "ColA on the CPU",
    "gpu": "ColA on another GPU",
}
_INCHES_PER_BAR = 0.19


def plot_costs(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws `draw_costs` into a file, if there is anything to draw.

    Args:
        rows: as there.
        path: PNG to write.
    """
    figure = draw_costs(rows)
    return path if figure is None else save_figure(figure, path)


def draw_costs(rows: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """One line of two panels (base memory, time of an iteration) for each section of the table.

    Args:
        rows: of `results.json`, those of one section together; rows without figures are left out.

    Returns:
        The figure; None if no row has figures.
    """
    measured = [row for row in rows if "seconds" in row]
    groups = [(title, list(group)) for title, group in groupby(measured, key=_title)]
    if not groups:
        return None
    heights = [max(1.5, _INCHES_PER_BAR * len(group) + 0.9) for _, group in groups]
    figure = new_figure(11, sum(heights) + 0.5)
    panels = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
    for (title, group), (memory, seconds) in zip(groups, panels, strict=True):
        _draw_memory(memory, group, title)
        _draw_seconds(seconds, group)
    _add_legend(figure, {_kind(row) for row in measured})
    return figure


def _draw_memory(axes: Any, group: Sequence[Mapping[str, Any]], title: str) -> None:
    unit, factor = ("GiB", 1024) if group[0]["base_mib"] >= 1024 else ("MiB", 1)
    sizes = [row["base_mib"] / factor for row in group]
    axes.set(xlabel=f"memory of the base device, {unit}", title=title)
    _bars(axes, group, sizes, sizes)


def _draw_seconds(axes: Any, group: Sequence[Mapping[str, Any]]) -> None:
    times = [1000 * row["seconds"] for row in group]
    spreads = [[1000 * end for end in row["seconds_spread"]] for row in group]
    axes.set(xlabel="iteration, end to end, ms (line: shortest to longest)")
    _bars(axes, group, times, [max(t, *ends) for t, ends in zip(times, spreads, strict=True)])
    axes.set_yticklabels([])
    for place, ends in enumerate(spreads):
        axes.plot(ends, (place, place), color=INK, linewidth=1)


def _add_legend(figure: "Figure", used: set[str]) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=kind)
        for kind, (colour, hatch) in _LOOKS.items()
        if kind in used
    ]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=len(patches),
        frameon=False,
        labelcolor=INK,
    )


def _bars(
    axes: Any,  # matplotlib's are not typed as what subplots returns
    group: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    ends: Sequence[float],
) -> None:
    """One bar for each row, and its number at the end of what is drawn there."""
    places = range(len(group))
    looks = [_LOOKS[_kind(row)] for row in group]
    axes.barh(
        places,
        values,
        color=[colour for colour, _ in looks],
        hatch=[hatch for _, hatch in looks],
        edgecolor="white",
        linewidth=0,
        height=0.75,
    )
    axes.set_yticks(places, [row["label"] for row in group], fontsize=7)
    axes.set_ylim(len(group) - 0.4, -0.6)  # the first row on top
    axes.set_xlim(left=0, right=1.12 * max(ends))  # room for the numbers
    plain(axes)
    for place, value, end in zip(places, values, ends, strict=True):
        number = f" {value:,.0f}" if value >= 1000 else f" {value:.3g}"
        axes.annotate(number, (end, place), va="center", fontsize=6, color=INK)


def _kind(row: Mapping[str, Any]) -> str:
    if row["method"] == "cola":
        return _OF_OFFLOAD[row["offload"]]
    return "floor" if row["method"] == "floor" else "back-propagation"


def _title(row: Mapping[str, Any]) -> str:
    lengths = "" if row["lengths"] == "full" else f", lengths of {row['lengths']}"
    settings = "".join(f", {setting}" for setting in row["settings"])
    return f"{row['model']}, batch size {row['batch_size']}{lengths}{settings}"
