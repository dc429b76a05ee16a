"""How figures look: colours that are told apart without colour vision, canvases, files.

Colours are those of Okabe and Ito; what they say is said by a marker, line style or hatch, too.
Matplotlib's object interface with own canvases: no global state, no display, safe in threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN = "#222222", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8A8A8A"

INK = BLACK
"""Text and axes; a page replaces it by its own text colour, so that figures live on dark ones."""

CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++")  # one fewer than colours: pairs differ

_RASTER_DPI = 110


@dataclass(frozen=True, kw_only=True)
class SeriesStyle:
    """How one series is drawn in every figure.

    Methods that are equal by design lie on one another: what is drawn first is larger, and merged
    forms have hollow markers around those of unmerged ones.
    """

    colour: str
    marker: str
    line: str = "-"
    size: float = 5
    is_hollow: bool = False

    @property
    def face(self) -> str:
        """Inside of the markers."""
        return "none" if self.is_hollow else self.colour


_STYLES = {
    "FT": SeriesStyle(colour=INK, marker="o", size=8),
    "LoRA": SeriesStyle(colour=BLUE, marker="s", size=8),
    "AdaLoRA": SeriesStyle(colour=SKY, marker="P"),
    "IA3": SeriesStyle(colour=GREY, marker="X"),
    "prompt tuning": SeriesStyle(colour=ORANGE, marker="<", line=":"),
    "prefix tuning": SeriesStyle(colour=ORANGE, marker=">", line="-."),
    "p-tuning": SeriesStyle(colour=ORANGE, marker="*", size=7),
    "ColA low-rank": SeriesStyle(colour=VERMILION, marker="^"),
    "ColA low-rank, merged": SeriesStyle(
        colour=VERMILION, marker="v", line="--", size=11, is_hollow=True
    ),
    "ColA linear": SeriesStyle(colour=GREEN, marker="D", size=4),
    "ColA linear, merged": SeriesStyle(
        colour=GREEN, marker="d", line="--", size=11, is_hollow=True
    ),
    "ColA MLP": SeriesStyle(colour=PURPLE, marker="p", size=6),
}


def method_styles(labels: Sequence[str]) -> dict[str, SeriesStyle]:
    """Methods of the paper in its order and style; then the others, hollow."""
    own = {label: style for label, style in _STYLES.items() if label in labels}
    others = cycle_styles([label for label in labels if label not in own])
    return own | {label: replace(style, is_hollow=True) for label, style in others.items()}


def cycle_styles(labels: Sequence[str]) -> dict[str, SeriesStyle]:
    """Styles for series that have none of their own."""
    return {
        label: SeriesStyle(colour=CYCLE[i % len(CYCLE)], marker=MARKERS[i % len(MARKERS)])
        for i, label in enumerate(labels)
    }


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches, whose layout keeps labels apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Any) -> Any:  # matplotlib's are not typed as what subplots returns
    """Axes without the two lines that bound nothing, in the ink of all figures."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelcolor=INK)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
    return axes


def save_figure(figure: "Figure", path: Path) -> Path:
    """Writes a file of the kind that the name's ending says; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_figure(figure, file, path.suffix.removeprefix("."))
    return path


def add_legend(figure: "Figure") -> None:
    """Beside the axes, where it hides nothing."""
    figure.legend(
        loc="outside right center", frameon=False, labelcolor=INK, fontsize=9, labelspacing=0.8
    )


def write_figure(figure: "Figure", file: IO[bytes], kind: str) -> None:
    """Writes a figure as `png`, or as `svg` without a background.

    The same figure gives the same bytes: no dates, and names of SVG parts from their content.
    """
    from matplotlib import rc_context

    is_vector = kind == "svg"
    with rc_context({"svg.hashsalt": "cola"}):
        figure.savefig(
            file,
            format=kind,
            dpi=_RASTER_DPI,
            transparent=is_vector,
            metadata={"Date": None} if is_vector else None,
        )
