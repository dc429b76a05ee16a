"""Memory and time of every row of a computation table as bars."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

# Okabe and Ito: told apart without colour vision. By who computes the adapters' gradients, where.
_COLOURS = {
    "floor": "#999999",
    "back-propagation": "#0072B2",
    "ColA on the base device": "#56B4E9",
    "ColA on the CPU": "#D55E00",
    "ColA on another GPU": "#009E73",
}
_OF_OFFLOAD = {
    "none": "ColA on the base device",
    "cpu": "ColA on the CPU",
    "gpu": "ColA on another GPU",
}
_INCHES_PER_BAR = 0.19


def plot_costs(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """One line of two panels (base memory, time of an iteration) for each section of the table.

    Args:
        rows: of `results.json`, those of one section together; rows without figures are left out.
        path: PNG to write.
    """
    # The object interface with its own canvas: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    measured = [row for row in rows if "seconds" in row]
    groups = [(title, list(group)) for title, group in groupby(measured, key=_title)]
    if not groups:
        return path
    heights = [max(1.5, _INCHES_PER_BAR * len(group) + 0.9) for _, group in groups]
    figure = Figure(figsize=(11, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
    for (title, group), (memory, seconds) in zip(groups, panels, strict=True):
        unit, factor = ("GiB", 1024) if group[0]["base_mib"] >= 1024 else ("MiB", 1)
        sizes = [row["base_mib"] / factor for row in group]
        _bars(memory, group, sizes, sizes)
        memory.set(xlabel=f"memory of the base device, {unit}", title=title)
        times = [1000 * row["seconds"] for row in group]
        spreads = [[1000 * end for end in row["seconds_spread"]] for row in group]
        _bars(
            seconds,
            group,
            times,
            [max(t, *spread) for t, spread in zip(times, spreads, strict=True)],
        )
        for place, spread in enumerate(spreads):
            seconds.plot(spread, (place, place), color="black", linewidth=0.8)
        seconds.set(xlabel="iteration, end to end, ms", yticklabels=[])
    used = {_kind(row) for row in measured}
    patches = [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items() if kind in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=130)
    return path


def _bars(
    axes: Any,  # matplotlib's are not typed as what subplots returns
    group: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    ends: Sequence[float],
) -> None:
    """One bar for each row, and its number at the end of what is drawn there."""
    places = range(len(group))
    axes.barh(places, values, color=[_COLOURS[_kind(row)] for row in group], height=0.75)
    axes.set_yticks(places, [row["label"] for row in group], fontsize=7)
    axes.set_ylim(len(group) - 0.4, -0.6)  # the first row on top
    axes.set_xlim(left=0, right=1.12 * max(ends))  # room for the numbers
    axes.spines[["top", "right"]].set_visible(False)
    for place, value, end in zip(places, values, ends, strict=True):
        axes.annotate(f" {value:,.3g}", (end, place), va="center", fontsize=6)


def _kind(row: Mapping[str, Any]) -> str:
    if row["method"] == "cola":
        return _OF_OFFLOAD[row["offload"]]
    return "floor" if row["method"] == "floor" else "back-propagation"


def _title(row: Mapping[str, Any]) -> str:
    lengths = "" if row["lengths"] == "full" else f", lengths of {row['lengths']}"
    return f"{row['model']}, batch size {row['batch_size']}{lengths}"
