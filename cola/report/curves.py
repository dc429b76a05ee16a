"""The learning curve of one run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola.report.style import BLUE, VERMILION, new_figure, plain, save_figure


def plot_learning_curve(
    rows: Sequence[dict[str, Any]], metric: str, title: str, path: Path
) -> Path:
    """Training loss and the selection metric over steps.

    Args:
        rows: lines of `metrics.jsonl`.
        metric: name of the judged metric, logged as `selection/<metric>`.
        title: of the figure.
        path: PNG to write.
    """
    figure = new_figure(7, 4)
    losses = plain(figure.add_subplot())
    steps, values = _series(rows, "train/loss")
    (loss_line,) = losses.plot(steps, values, color=BLUE, label="training loss")
    losses.set(xlabel="step (batches)", ylabel="training loss", title=title)
    lines = [loss_line]
    steps, values = _series(rows, f"selection/{metric}")
    if steps:
        scores = losses.twinx()
        scores.spines["top"].set_visible(False)
        (line,) = scores.plot(
            steps, values, color=VERMILION, marker="o", markersize=3, label=f"selection {metric}"
        )
        scores.set_ylabel(metric)
        lines.append(line)
    losses.legend(handles=lines, loc="center right", frameon=False)
    return save_figure(figure, path)


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [value for _, value in points]
