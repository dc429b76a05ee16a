"""What a report shows, in order: accuracy tables, computation tables, figures, what is missing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cola.grid import rows_of
from cola.report.accuracy import AccuracyTable
from cola.report.accuracy_build import build_table
from cola.report.accuracy_pairs import paired_statistics
from cola.report.accuracy_print import conditions, printed
from cola.report.bench_figure import draw_costs
from cola.report.bench_table import cost_sections, unmeasured
from cola.report.curve_figures import NamedFigure, interval_figures, learning_curves
from cola.report.finding import BenchRow, Found
from cola.report.grid_state import RowState, grid_states
from cola.report.matching import Match, match_runs
from cola.report.provenance import RunFacts, environment, rows_by_run, run_facts
from cola.report.published import TABLES
from cola.report.score_figures import memory_figures, user_figures
from cola.report.table import PrintedTable

COST_TABLES = tuple(range(10, 19))
NO_TABLE = 0
"""Stands for measurements of `cola-bench` that belong to no table of the paper."""

ABLATIONS = tuple(f"figure{number}" for number in range(4, 12))
FIGURES = ("curves", "intervals", *ABLATIONS, "memory", "costs", "users")
"""What `--figure` takes; the numbers are the paper's."""


@dataclass(frozen=True, kw_only=True)
class ShownSection:
    """An accuracy table's section with how it came about."""

    conditions: str
    table: PrintedTable
    pairs: PrintedTable | None
    is_stand_in: bool
    runs: tuple[RunFacts, ...]


@dataclass(frozen=True, kw_only=True)
class ShownAccuracy:
    """An accuracy table.

    Attributes:
        scores: all of it as numbers.
        sections: as they are printed.
        missing: commands of the paper's rows that were not run.
    """

    scores: AccuracyTable
    sections: tuple[ShownSection, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShownCosts:
    """A computation table; `NO_TABLE` where measurements belong to none of the paper.

    Attributes:
        number: of the table.
        rows: as `cola-bench` wrote them.
        measured: a table for each way of measuring.
        missing: the paper's rows that were not measured.
        calls: command and environment of every call of `cola-bench`.
    """

    number: int
    rows: tuple[BenchRow, ...]
    measured: tuple[PrintedTable, ...]
    missing: tuple[PrintedTable, ...]
    calls: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a report shows."""

    accuracy: tuple[ShownAccuracy, ...]
    costs: tuple[ShownCosts, ...]
    figures: tuple[NamedFigure, ...]
    states: tuple[RowState, ...]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked for; None means all that there is something of.

    Attributes:
        tables: their numbers; an empty one is shown, too, if it was asked for.
        figures: of `FIGURES`.
        draws: whether figures go anywhere.
    """

    tables: frozenset[int] | None = None
    figures: frozenset[str] | None = None
    draws: bool = True


def build_content(found: Found, wanted: Wanted) -> Content:
    """Lays out everything that was found.

    Args:
        found: runs and measurements.
        wanted: tables and figures.
    """
    matches = match_runs(found.runs)
    states = tuple(grid_states(matches, found.bench_rows))
    # One kind that was asked for leaves the other out.
    is_partial = wanted.tables is not None or wanted.figures is not None
    tables = wanted.tables if wanted.tables is not None else (frozenset() if is_partial else None)
    figures = (
        wanted.figures if wanted.figures is not None else frozenset(FIGURES * (not is_partial))
    )
    return Content(
        accuracy=tuple(_accuracy(matches, states, tables)),
        costs=tuple(_costs(found.bench_rows, tables)),
        figures=tuple(_figures(found, matches, figures)) if wanted.draws else (),
        states=states,
    )


def _accuracy(
    matches: Sequence[Match], states: Sequence[RowState], wanted: frozenset[int] | None
) -> Iterable[ShownAccuracy]:
    rows = rows_by_run(matches)
    for number in TABLES:
        scores = build_table(number, matches)
        if scores.is_empty if wanted is None else number not in wanted:
            continue
        sections = (
            ShownSection(
                conditions=conditions(number, section),
                table=table,
                pairs=paired_statistics(section),
                is_stand_in=section.is_stand_in,
                runs=tuple(run_facts(section.runs, rows)),
            )
            for section, table in zip(scores.sections, printed(scores), strict=True)
        )
        own = {state.row: state.runs for state in states}
        missing = tuple(row.command for row in rows_of(f"table{number}") if not own[row])
        yield ShownAccuracy(scores=scores, sections=tuple(sections), missing=missing)


def _costs(rows: Sequence[BenchRow], wanted: frozenset[int] | None) -> Iterable[ShownCosts]:
    for number in (*COST_TABLES, NO_TABLE):
        own = tuple(row for row in rows if (row["table"] or NO_TABLE) == number)
        if not own if wanted is None else number not in wanted:
            continue
        calls = {
            (" ".join(row["source"]["command"]), environment(row["source"])): None for row in own
        }
        yield ShownCosts(
            number=number,
            rows=own,
            measured=tuple(cost_sections(own)),
            missing=tuple(unmeasured(number, own)),
            calls=tuple(calls),
        )


def _figures(
    found: Found, matches: Sequence[Match], wanted: frozenset[str]
) -> Iterable[NamedFigure]:
    if "curves" in wanted:
        yield from learning_curves(found.runs)
    if wanted & {"intervals", *ABLATIONS}:
        matched = {id(match.run) for match in matches}
        others = [run for run in found.runs if id(run) not in matched]
        drawn = interval_figures(matches, others)
        yield from (figure for figure in drawn if figure.name in wanted)
    if "memory" in wanted:
        yield from memory_figures(found.runs)
    if "costs" in wanted:
        yield from _cost_figures(found.bench_rows)
    if "users" in wanted:
        yield from user_figures(found.runs)


def _cost_figures(rows: Sequence[BenchRow]) -> Iterable[NamedFigure]:
    for number in dict.fromkeys(row["table"] or NO_TABLE for row in rows):
        own = [row for row in rows if (row["table"] or NO_TABLE) == number]
        figure = draw_costs(own)
        if figure is not None:
            title = f"Table {number}" if number else "Measurements of no table"
            yield NamedFigure(
                name=f"costs_table{number}" if number else "costs",
                title=f"Memory and time: {title}",
                caption="Medians. What is measured and how: cola-bench.",
                figure=figure,
            )
