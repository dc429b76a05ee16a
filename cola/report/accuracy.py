"""What an accuracy table (2, 3, 4, 6, 7, 8, 9) holds, before any text is made of it.

A table has a section for each way in which its runs were made: the paper's models apart from those
that stand in for them, and lengths of training apart from one another. Every section has all rows
and columns of the paper.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from cola.report.published import PublishedScores, RowKey
from cola.report.runs import Run


@dataclass(frozen=True, kw_only=True)
class SectionKey:
    """What runs of a section have in common.

    Attributes:
        stand_in: what takes the place of what; empty for the paper's models.
        length: of training, in words.
        batch_size: rows of a step; None where it is not known.
        select_on: kind of split that chose the best evaluation.
    """

    stand_in: str
    length: str
    batch_size: int | None
    select_on: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Our scores of a row and column, in percent, by seed; and the paper's.

    Attributes:
        scores: empty where nothing was run.
        published: as printed; empty where the paper has none.
        doubt: why the published value cannot be trusted; empty if it can.
        runs: that were averaged.
        rank: 1 for the best of its column and model, 2 for the second best, else 0.
    """

    scores: Mapping[int, float]
    published: str
    doubt: str = ""
    runs: tuple[Run, ...] = ()
    rank: int = 0

    @property
    def mean(self) -> float | None:
        """Over seeds."""
        return statistics.fmean(self.scores.values()) if self.scores else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        mean = self.mean
        return mean - float(self.published) if mean is not None and self.published else None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of a section."""

    key: RowKey
    published: PublishedScores
    cells: Mapping[str, Cell]

    @property
    def runs(self) -> list[Run]:
        """All that were averaged, each once."""
        return list({id(run): run for cell in self.cells.values() for run in cell.runs}.values())


@dataclass(frozen=True, kw_only=True)
class Section:
    """All rows of a table, from runs made in one way.

    Attributes:
        key: how; None where there are no runs.
        lines: in the paper's order.
        columns: in the paper's order.
        notes: what a reader has to know about single cells.
    """

    key: SectionKey | None
    lines: tuple[Line, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_stand_in(self) -> bool:
        """Whether its numbers are those of other models or tasks than the paper's."""
        return self.key is not None and bool(self.key.stand_in)

    @property
    def runs(self) -> list[Run]:
        """All that were averaged, each once."""
        return list({id(run): run for line in self.lines for run in line.runs}.values())


@dataclass(frozen=True, kw_only=True)
class AccuracyTable:
    """A table of the paper: the sections of its own models first."""

    number: int
    sections: tuple[Section, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it was run."""
        return not any(section.runs for section in self.sections)
