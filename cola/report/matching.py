"""Which row of the paper's grid a run is, and whether it is that row or stands in for it.

A run that was started by a row's experiment belongs to that row, whatever model and data it was
given; any other one to the row that has its model, task, method and interval, or, where only one
base model is asked for on its task, its task, method and interval. With another model or task than
the paper's, or with built-in rows, it is a stand-in, and no table shows it among the paper's.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cola.grid import STAND_INS, GridRow, ablation_rows, accuracy_rows
from cola.report.runs import BUILT_IN, Run

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Match:
    """A run and its row."""

    run: Run
    row: GridRow

    @property
    def stand_in(self) -> str:
        """What was trained in the place of what; empty for the paper's model and data."""
        run, row = self.run, self.row
        parts = []
        if run.model != row.model:
            parts.append(f"{run.model} for {row.model}")
        if run.task != row.task:
            parts.append(f"{run.task} for {row.task}")
        if run.data_dir == BUILT_IN:
            parts.append("built-in sample rows for the data set")
        return ", ".join(parts)


def match_runs(runs: Iterable[Run]) -> list[Match]:
    """Runs that belong to a row of an accuracy table or of an interval ablation, in their order."""
    return [Match(run=run, row=row) for run in runs if (row := _row_of(run)) is not None]


def _row_of(run: Run) -> GridRow | None:
    if named := _by_experiment().get(run.experiment):
        return _named_row(run, named)
    found = _by_facts().get((run.task, run.method, run.adapter, run.merge, run.users, run.interval))
    alike = [row for row in found or [] if _has_layout(row, run)]
    own = [row for row in alike if row.model == run.model]
    if own:
        return own[0]
    models = {row.model for row in alike}
    return alike[0] if len(models) == 1 else None


def _has_layout(row: GridRow, run: Run) -> bool:
    """An ablation has a batch size of its own; a table's runs may have any, which is said."""
    is_table = row.shown_in[0].startswith("table")
    return is_table or row.batch_size == run.batch_size


def _named_row(run: Run, rows: Sequence[GridRow]) -> GridRow | None:
    """The row of an experiment; in what its rows differ, the run has to agree with one."""
    if len({row.task for row in rows}) > 1:
        rows = [row for row in rows if row.task == run.task]
    if len({row.interval for row in rows}) > 1:
        rows = [row for row in rows if row.interval == run.interval]
    # Of several models an unknown one stands in for the first.
    own = [row for row in rows if run.model in (row.model, STAND_INS.get(row.model))]
    return next(iter(own or rows), None)


@functools.cache
def _by_experiment() -> Mapping[str, list[GridRow]]:
    return _grouped((row.experiment, row) for row in (*accuracy_rows(), *ablation_rows()))


@functools.cache
def _by_facts() -> Mapping[tuple[object, ...], list[GridRow]]:
    # Tables first: at interval 1 a run of either batch size belongs there.
    return _grouped(
        ((row.task, row.method, row.adapter, row.merge, row.users, row.interval), row)
        for row in (*accuracy_rows(), *ablation_rows())
    )


def _grouped(pairs: Iterable[tuple[Key, GridRow]]) -> dict[Key, list[GridRow]]:
    groups: dict[Key, list[GridRow]] = {}
    for key, row in pairs:
        groups.setdefault(key, []).append(row)
    return groups
