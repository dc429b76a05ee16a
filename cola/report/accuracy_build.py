"""Puts runs into the rows and columns of an accuracy table.

What cannot be averaged (runs of other settings in the same cell) is left out, and a note says so.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cola.grid import GridRow
from cola.report.accuracy import AccuracyTable, Cell, Line, Section, SectionKey
from cola.report.matching import Match
from cola.report.names import column_label
from cola.report.published import (
    ALL_MERGED,
    ALL_UNMERGED,
    AVERAGE,
    USER_TABLES,
    RowKey,
    columns_of,
    published_scores,
)
from cola.report.runs import Run, differences, of_one_variant

PERCENT = 100

Pools = dict[tuple[RowKey, str], list[Run]]
"""Runs of a section by row and, where columns are tasks, column."""

LeftOut = dict[tuple[str, str], dict[str, int]]
"""Runs that no cell shows: number by column, by method and the settings that they differ in."""


def build_table(number: int, matches: Iterable[Match]) -> AccuracyTable:
    """A table from all runs that there are; one empty section if none belongs to it.

    Args:
        number: one of `published.TABLES`.
        matches: of any tables.
    """
    keys = {_layout(key, number): key for key in published_scores(number)}
    sections: dict[SectionKey, Pools] = {}
    for match in matches:
        if f"table{number}" in match.row.shown_in:
            pools = sections.setdefault(_section_key(match), {})
            column = "" if number in USER_TABLES else match.row.task
            pools.setdefault((keys[_layout(match.row, number)], column), []).append(match.run)
    ordered = sorted(sections.items(), key=lambda pair: (pair[0].stand_in, pair[0].length))
    found = [_section(number, key, pools) for key, pools in ordered]
    return AccuracyTable(number=number, sections=tuple(found or [_section(number, None, {})]))


def _layout(row: RowKey | GridRow, number: int) -> tuple[str, ...]:
    """What tells rows apart. Table 6 prints joint runs of Table 4 as those of one user."""
    users = row.users if number in USER_TABLES else ""
    return row.model, row.method, row.adapter, row.merge, users


def _section_key(match: Match) -> SectionKey:
    return SectionKey(
        stand_in=match.stand_in,
        length=match.run.length,
        batch_size=match.run.batch_size,
        select_on=str(match.run.settings.get("evaluation.select_on", "validation")),
    )


def _section(number: int, key: SectionKey | None, pools: Pools) -> Section:
    columns = columns_of(number)
    is_stand_in = key is not None and bool(key.stand_in)
    left_out: LeftOut = {}
    lines = []
    for row, published in published_scores(number).items():
        runs = {
            column: _of_one_variant(pools.get((row, place), []), place, left_out)
            for place, column in _places(number, columns)
        }
        scores = _scores(number, columns, runs)
        cells = {
            column: Cell(
                scores=scores[column],
                published="" if is_stand_in else published.values.get(column, ""),
                doubt=published.uncertain.get(column, ""),
                runs=tuple(runs.get(column, ())) if scores[column] else (),
            )
            for column in columns
        }
        lines.append(Line(key=row, published=published, cells=cells))
    return Section(
        key=key,
        lines=tuple(_ranked(lines, columns)),
        columns=tuple(columns),
        notes=tuple(map(_left_out_note, left_out, left_out.values())),
    )


def _places(number: int, columns: Iterable[str]) -> list[tuple[str, str]]:
    """Where the runs of a column are found: users' columns share theirs, an average has none."""
    if number in USER_TABLES:
        return [("", column) for column in columns]
    return [(column, column) for column in columns if column != AVERAGE]


def _of_one_variant(runs: Sequence[Run], column: str, left_out: LeftOut) -> list[Run]:
    chosen = of_one_variant(runs)
    others = [run for run in runs if run.variant != chosen[0].variant]
    if others:
        shown = " ".join(differences(others, chosen)) or "fewer settings"
        left_out.setdefault((chosen[0].label, shown), {})[column] = len(others)
    return chosen


def _left_out_note(what: tuple[str, str], columns: Mapping[str, int]) -> str:
    label, settings = what
    where = ", ".join(column_label(column) for column in columns if column)
    return (
        f"{label}{' on ' * bool(where)}{where}: runs with other settings ({settings}) are left "
        f"out: {sum(columns.values())}"
    )


def _scores(
    number: int, columns: Sequence[str], runs: Mapping[str, Sequence[Run]]
) -> dict[str, dict[int, float]]:
    """Percent by column and seed. An average needs all of its columns, at the same seed."""
    of = _user_score if number in USER_TABLES else _score
    found = {
        column: {run.seed: PERCENT * score for run in own if (score := of(run, column)) is not None}
        for column, own in runs.items()
    }
    if AVERAGE in columns:
        parts = list(found.values())
        seeds = set.intersection(*(set(part) for part in parts))
        found[AVERAGE] = {
            seed: statistics.fmean(part[seed] for part in parts) for seed in sorted(seeds)
        }
    return found


def _score(run: Run, _: str) -> float | None:
    return run.score


def _user_score(run: Run, column: str) -> float | None:
    """Of a user as the run evaluates; of all with adapters merged or not, where it was scored."""
    result: Mapping[str, Any] = run.summary["result"]
    word = {ALL_UNMERGED: "unmerged", ALL_MERGED: "merged"}.get(column)
    if word is None:
        scores = result.get("by_user", {}).get(column, {})
    else:
        scores = (result.get(word) or {}).get("scores", {}).get(result["split"], {})
    score: float | None = scores.get(run.metric)
    return score


def _ranked(lines: Sequence[Line], columns: Sequence[str]) -> list[Line]:
    """Lines whose best and second best cells say so.

    What prints alike ranks alike; where all are alike none is best.
    """
    ranks: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        for column in columns:
            mean = line.cells[column].mean
            if mean is not None:
                ranks.setdefault((line.key.model, column), []).append(_printed(mean))
    best = {place: sorted(set(means), reverse=True)[:2] for place, means in ranks.items()}

    def rank(line: Line, column: str) -> int:
        mean, place = line.cells[column].mean, (line.key.model, column)
        if mean is None or len(best[place]) < 2 or _printed(mean) not in best[place]:
            return 0
        return best[place].index(_printed(mean)) + 1

    return [
        dataclasses.replace(
            line,
            cells={c: dataclasses.replace(line.cells[c], rank=rank(line, c)) for c in columns},
        )
        for line in lines
    ]


def _printed(mean: float) -> float:
    return round(mean, 1)
