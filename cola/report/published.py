"""The paper's scores of Tables 2, 3, 4, 6, 7, 8 and 9: what a table prints, row by row.

The order of rows and columns is the layout of our tables, too.
"""

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

TABLES = (2, 3, 4, 6, 7, 8, 9)
USER_TABLES = (4, 8)
"""Their columns are users; those of the other tables are tasks."""

AVERAGE, ALL, ALL_UNMERGED, ALL_MERGED = "avg", "all", "all_unmerged", "all_merged"


@dataclass(frozen=True, kw_only=True)
class RowKey:
    """Which row of a table; `adapter` and `merge` are empty for baselines."""

    model: str
    method: str
    adapter: str
    merge: str
    users: str


@dataclass(kw_only=True)
class PublishedScores:
    """A printed row.

    Attributes:
        metric: `glue` (Matthews for CoLA, Pearson for STS-B, else accuracy), `rougeL`, `accuracy`.
        trainable: parameters, rounded as printed.
        values: percent by column, as printed; empty where the paper prints a dash.
        uncertain: columns whose value cannot be trusted, with the reason.
    """

    metric: str
    trainable: int
    values: dict[str, str] = field(default_factory=dict)
    uncertain: dict[str, str] = field(default_factory=dict)


@functools.cache
def published_scores(table: int) -> Mapping[RowKey, PublishedScores]:
    """Rows of a table in the paper's order.

    A row that was trained merged prints one value for all users, which stands under `all_merged`.

    Args:
        table: one of `TABLES`.
    """
    source = resources.files("cola.report") / "published" / "accuracy.csv"
    rows: dict[RowKey, PublishedScores] = {}
    for line in csv.DictReader(source.read_text(encoding="utf-8").splitlines()):
        if int(line["table"]) != table:
            continue
        key = RowKey(**{name: line[name] for name in RowKey.__dataclass_fields__})
        trainable = int(line["trainable_params"])
        row = rows.setdefault(key, PublishedScores(metric=line["metric"], trainable=trainable))
        column = ALL_MERGED if line["column"] == ALL else line["column"]
        row.values[column] = line["value"]
        if line["uncertain"] == "true":
            row.uncertain[column] = line["note"]
    return rows


def columns_of(table: int) -> list[str]:
    """A table's columns in the paper's order: tasks and their average, or users and all."""
    return list(dict.fromkeys(c for row in published_scores(table).values() for c in row.values))
