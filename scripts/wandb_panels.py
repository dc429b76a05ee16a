"""What the Weights & Biases views show: sections of panels over the names that runs log.

`scripts/wandb_dashboards.py` lays them out. Curves are over logged names, bars and points over the
summary, whose nested names W&B joins with dots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr

from cola.wandb_tracker import STEP

SCORES = ("accuracy", "exact_match", "matthews_correlation", "pearson", "rougeL")
"""Judged metrics of all tasks; a run has one of them."""

USERS = (
    "classification",
    "information_extraction",
    "summarization",
    "brainstorming",
    "creative_writing",
    "open_qa",
    "closed_qa",
    "general_qa",
)
"""Dolly's categories, in the paper's order."""

BASE_PEAK = "memory/base_device_peak_mib"

Panel = Any
"""Of `wandb_workspaces`, which has no common type for them."""


@dataclass(frozen=True)
class Section:
    """Panels that answer one question."""

    name: str
    about: str
    panels: list[Panel]


def sections() -> list[Section]:
    """What both the workspace and the report show."""
    return [
        Section(
            "Scores",
            "The reported score of the best evaluation, and what it costs on the base device.",
            [
                bars("score", ["result.value"], "share or correlation"),
                wr.ScatterPlot(
                    title="score against memory of the base device, MiB",
                    x=wr.SummaryMetric(f"{BASE_PEAK}.max"),
                    y=wr.SummaryMetric("result.value"),
                    log_x=True,
                ),
            ],
        ),
        Section(
            "Learning curves",
            "Selection scores are what picks the step that is reported.",
            [
                curve("training loss", ["train/loss"], "loss"),
                curve(
                    "selection score",
                    [f"selection/{name}" for name in SCORES],
                    "share or correlation",
                ),
                curve("selection loss", ["selection/loss"], "loss"),
                curve("learning rate", ["train/learning_rate"], "rate"),
            ],
        ),
        Section(
            "Time",
            "Base: busy time of the base device. Offload: of fits, summed over workers. Stall: the "
            "base device's host waits for parameters.",
            [
                curve("time of an iteration", ["time/iteration_seconds"], "s"),
                curve("base part", ["time/base_seconds"], "s"),
                curve("offload part", ["time/offload_seconds"], "s"),
                curve("stall", ["time/stall_seconds"], "s"),
                bars(
                    "time of a step, medians",
                    ["iteration_seconds", "base_seconds", "offload_seconds", "stall_seconds"],
                    "s",
                ),
            ],
        ),
        Section(
            "Memory",
            "Peaks while training; by owner it is what is held when a step is logged.",
            [
                matching("peak by device", r"memory/(cpu|cuda\d+)_peak_mib", "MiB"),
                matching("base model", r"memory/(cpu|cuda\d+)_base_model_mib", "MiB"),
                matching("adapters", r"memory/(cpu|cuda\d+)_adapters_mib", "MiB"),
                matching("optimizer states", r"memory/(cpu|cuda\d+)_optimizer_mib", "MiB"),
                curve("adaptation data and parameters sent", ["wire/bytes_per_step"], "B per step"),
                curve("process", ["memory/resident_mib"], "MiB"),
            ],
        ),
        Section(
            "Users",
            "Scores of every user, where runs have users; bars are those of Dolly's.",
            [
                matching("selection score of users", "selection/user/.*", "share or correlation"),
                bars(
                    "reported score of users",
                    [f"result.by_user.{user}.rougeL" for user in USERS],
                    "rougeL, share",
                ),
            ],
        ),
        Section(
            "Predictions",
            "First rows of a split, beside what was wanted.",
            [
                wr.WeavePanelSummaryTable(table_name=f"samples/{split}")
                for split in ("test", "validation")
            ],
        ),
    ]


def curve(title: str, keys: list[str], unit: str) -> Panel:
    """Lines over steps; of seeds, mean and standard deviation."""
    return wr.LinePlot(title=title, y=keys, title_y=unit, **_OVER_STEPS)


def matching(title: str, pattern: str, unit: str) -> Panel:
    """Lines of all names that a pattern matches."""
    return wr.LinePlot(title=title, metric_regex=pattern, title_y=unit, **_OVER_STEPS)


_OVER_STEPS: dict[str, Any] = {
    "x": STEP,
    "title_x": "step (batches)",
    "groupby_aggfunc": "mean",
    "groupby_rangefunc": "stddev",
}


def bars(title: str, keys: list[str], unit: str) -> Panel:
    """One bar per run or group, of a number in the summary."""
    return wr.BarPlot(
        title=title,
        metrics=keys,
        title_x=unit,
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
    )


def panel_names(panel: Panel) -> list[str]:
    """Names of the numbers and tables that a panel shows; patterns stand between slashes."""
    if isinstance(panel, wr.LinePlot):
        return [f"/{panel.metric_regex}/"] if panel.metric_regex else _names(panel.y)
    if isinstance(panel, wr.ScatterPlot):
        return _names([panel.x, panel.y])
    if isinstance(panel, wr.BarPlot):
        return _names(panel.metrics)
    return [panel.table_name]


def _names(keys: Sequence[Any]) -> list[str]:
    return [getattr(key, "name", key) for key in keys]
