"""Which rows of the paper's grid are done, and how far each table and figure is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cola.grid import GridRow, ablation_rows, accuracy_rows, computation_rows
from cola.report.bench_published import PublishedRow
from cola.report.bench_table import published_row
from cola.report.finding import BenchRow
from cola.report.matching import Match
from cola.report.names import method_label, task_label
from cola.report.table import MISSING
from cola.report.text import format_table


@dataclass(frozen=True, kw_only=True)
class RowState:
    """A row of the grid.

    Attributes:
        row: of the grid.
        runs: finished runs of it, or measurements, seeds and placements counted.
        stand_ins: finished runs of other models or data in its place.
    """

    row: GridRow
    runs: int
    stand_ins: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a table or figure is: its rows, those with runs, those with stand-ins only."""

    name: str
    rows: int
    done: int
    stand_ins: int


def grid_states(matches: Iterable[Match], bench_rows: Iterable[BenchRow]) -> list[RowState]:
    """Every row of the paper, in its order."""
    own: dict[GridRow, int] = {}
    others: dict[GridRow, int] = {}
    for match in matches:
        counts = others if match.stand_in else own
        counts[match.row] = counts.get(match.row, 0) + 1
    measured: dict[PublishedRow, int] = {}
    for row in bench_rows:
        if row["table"] is not None and row["is_plain"] and "seconds" in row:
            key = published_row(row)
            measured[key] = measured.get(key, 0) + 1
    trained = [
        RowState(row=row, runs=own.get(row, 0), stand_ins=others.get(row, 0))
        for row in (*accuracy_rows(), *ablation_rows())
    ]
    costs = [
        RowState(row=row, runs=measured.get(_published(row), 0), stand_ins=0)
        for row in computation_rows()
    ]
    return trained + costs


def _published(row: GridRow) -> PublishedRow:
    return PublishedRow(
        table=int(row.shown_in[0].removeprefix("table")),
        model=row.model,
        users=row.num_users,
        batch_size=row.batch_size,
        method=row.method,
        adapter=row.adapter,
        merge=row.merge,
    )


def progress(states: Sequence[RowState]) -> list[Progress]:
    """A line for every table and figure; a run that two of them show counts in both."""
    names = sorted({name for state in states for name in state.row.shown_in}, key=_order)
    return [_progress(name, [s for s in states if name in s.row.shown_in]) for name in names]


def _order(name: str) -> tuple[bool, int]:
    kind = name.rstrip("0123456789")
    return kind == "figure", int(name.removeprefix(kind))


def _progress(name: str, states: Sequence[RowState]) -> Progress:
    return Progress(
        name=name,
        rows=len(states),
        done=sum(state.runs > 0 for state in states),
        stand_ins=sum(state.runs == 0 and state.stand_ins > 0 for state in states),
    )


def list_grid(states: Sequence[RowState]) -> str:
    """All rows with their commands, and how many are done, as Markdown."""
    header = ["shown in", "model", "task", "method", "I", "batch", "runs", "stand-ins", "command"]
    lines = [
        [
            ", ".join(state.row.shown_in),
            state.row.model,
            task_label(state.row.task),
            _method(state.row),
            str(state.row.interval),
            str(state.row.batch_size),
            str(state.runs or MISSING),
            str(state.stand_ins or MISSING),
            state.row.command,
        ]
        for state in states
    ]
    return f"{format_table(header, lines)}\n\n{count_grid(states)}"


def _method(row: GridRow) -> str:
    name = method_label(row.method, row.adapter, row.merge)
    return name if row.users == "one" else f"{row.users}: {name}"


def count_grid(states: Sequence[RowState]) -> str:
    """How many rows of each kind there are and are done."""
    kinds: Mapping[str, frozenset[GridRow]] = {
        "accuracy runs": frozenset(accuracy_rows()),
        "ablation runs": frozenset(ablation_rows()),
        "computation rows": frozenset(computation_rows()),
    }
    counted = {kind: [state for state in states if state.row in kinds[kind]] for kind in kinds}
    return "; ".join(
        f"{len(own)} {kind}, {sum(state.runs > 0 for state in own)} done"
        for kind, own in counted.items()
        if own
    )
