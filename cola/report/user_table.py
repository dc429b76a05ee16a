"""Tables 4 and 8: scores of every user and of all, in the paper's layout and beside its numbers.

Rows are experiments (`conf/experiment/table4_...`); runs are found by the folder that an experiment
names. What was not run is shown as missing.
"""

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cola.config.identity import SUMMARY_FILE
from cola.errors import DataError
from cola.report.text import format_table

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
"""Columns of both tables: Dolly's categories, in the paper's order."""

ALL_UNMERGED, ALL_MERGED, ALL = "all_unmerged", "all_merged", "all"
MISSING = "-"


@dataclass(frozen=True)
class TableRow:
    """One printed row: how users share, what they train, and how it is trained."""

    users: str
    adapter: str
    merge: str

    def experiment(self, table: str) -> str:
        """Name of the experiment that gives the row, and of its folder."""
        name = f"table{table}_{self.users}_{self.adapter.replace('-', '_')}"
        return f"{name}_{self.merge}" if self.users == "joint" else name


def published(table: str) -> dict[TableRow, dict[str, str]]:
    """The paper's values by row and column, as printed; empty where it prints a dash.

    Raises:
        DataError: another table than 4 or 8.
    """
    source = resources.files("cola.report") / "published" / "users.csv"
    found: dict[TableRow, dict[str, str]] = {}
    for line in csv.DictReader(source.read_text(encoding="utf-8").splitlines()):
        if line["table"] == table:
            row = TableRow(line["users"], line["adapter"], line["merge"])
            found.setdefault(row, {})[line["column"]] = line["value"]
    if not found:
        raise DataError(f"table {table}: not one of users; give 4 or 8")
    return found


def read_runs(folders: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """Summaries of finished runs below some folders, by the name of their experiment."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        for file in sorted(folder.rglob(SUMMARY_FILE)):
            summary = json.loads(file.read_text(encoding="utf-8"))
            runs.setdefault(file.parent.parent.name, []).append(summary)
    return runs


def user_table(table: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The table as Markdown: mean over runs, their standard deviation, the paper's value.

    Args:
        table: `4` or `8`.
        runs: summaries by experiment.
    """
    lines = []
    for row, paper in published(table).items():
        own = runs.get(row.experiment(table), [])
        scores = [_scores(summary) for summary in own]
        counts = sorted({summary["trainable_parameters"] for summary in own})
        # A row that was trained merged prints one value for all.
        paper = paper | {ALL_MERGED: paper.get(ALL_MERGED, paper.get(ALL, ""))}
        lines.append(
            [
                row.users,
                row.adapter,
                row.merge,
                ", ".join(f"{count:,}" for count in counts) or MISSING,
                *(
                    _cell([one[column] for one in scores if column in one], paper.get(column, ""))
                    for column in (*USERS, ALL_UNMERGED, ALL_MERGED)
                ),
            ]
        )
    header = [
        "users",
        "adapter",
        "trained",
        "trainable",
        *(user.replace("_", " ") for user in USERS),
    ]
    return format_table([*header, "all, unmerged", "all, merged"], lines)


def _scores(summary: Mapping[str, Any]) -> dict[str, float]:
    """A run's printed values by column: users as the run evaluates, all in both ways if it has."""
    result = summary["result"]
    metric, split = result["metric"], result["split"]
    scores = {user: own[metric] for user, own in result["by_user"].items()}
    for column, word in ((ALL_UNMERGED, "unmerged"), (ALL_MERGED, "merged")):
        if result.get(word) is not None:
            scores[column] = result[word]["scores"][split][metric]
    return scores


def _cell(values: Sequence[float], paper: str) -> str:
    """Percent, with the spread over runs and the paper's value in parentheses."""
    if not values:
        return f"{MISSING} ({paper})" if paper else MISSING
    text = f"{100 * statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f"±{100 * statistics.stdev(values):.1f}"
    return f"{text} ({paper})" if paper else text
