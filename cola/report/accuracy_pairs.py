"""Is a method on par with another? Paired statistics of a section of an accuracy table.

Every method is compared with LoRA, where LoRA was not run with full fine-tuning, on the tasks and
seeds that both have. Tables of users compare users who share with one joint set of adapters.
"""

from collections.abc import Iterator, Sequence

from cola.report.accuracy import Line, Section
from cola.report.names import column_label, method_label
from cola.report.paired import LEGEND, MIN_SEEDS, Pair, compare, paired_rows
from cola.report.published import AVERAGE
from cola.report.table import PrintedTable, Text

MARGIN, CONFIDENCE = 1.0, 0.95
"""In percentage points: differences below a point do not matter; and the intervals' confidence."""

_REFERENCES = ("lora", "ft")


def paired_statistics(section: Section) -> PrintedTable | None:
    """A line for each method, task and mean over tasks; None where no two methods share two seeds.

    Args:
        section: of an accuracy table.
    """
    lines: list[tuple[Text, ...]] = []
    header: list[str] = []
    for model in dict.fromkeys(line.key.model for line in section.lines):
        own = [line for line in section.lines if line.key.model == model]
        reference = _reference(own)
        if reference is None:
            continue
        for line in own:
            if line is not reference and (found := _compared(line, reference)):
                header, rows = found
                name = f"{_name(line)} - {_name(reference)}"
                label = f"{model}: {name}" if len(own) < len(section.lines) else name
                lines += [(Text(main=label), *(Text(main=cell) for cell in row)) for row in rows]
    if not lines:
        return None
    level = round(1 - CONFIDENCE, 6)
    legend = LEGEND.format(confidence=100 * CONFIDENCE, margin=MARGIN, level=level)
    return PrintedTable(
        title="Paired differences",
        header=("first - second", *header),
        num_labels=2,
        lines=tuple(lines),
        notes=(" ".join(legend.split()),),
    )


def _reference(lines: Sequence[Line]) -> Line | None:
    """What others are compared with: LoRA, FT, or in tables of users the first joint row."""
    candidates = [line for name in _REFERENCES for line in lines if line.key.method == name]
    candidates += [line for line in lines if line.key.users == "joint"]
    return next((line for line in candidates if len(_scores(line)) >= MIN_SEEDS), None)


def _compared(first: Line, second: Line) -> tuple[list[str], list[list[str]]] | None:
    ours, theirs = _scores(first), _scores(second)
    common = [pair for pair in ours if pair in theirs]
    tasks = [task for task, _ in common]
    pairs = [pair for pair in common if tasks.count(pair[0]) >= MIN_SEEDS]
    if not pairs:
        return None
    comparison = compare({p: ours[p] for p in pairs}, {p: theirs[p] for p in pairs})
    return paired_rows(comparison, margin=MARGIN, confidence=CONFIDENCE, factor=1)


def _scores(line: Line) -> dict[Pair, float]:
    return dict(_pairs(line))


def _pairs(line: Line) -> Iterator[tuple[Pair, float]]:
    for column, cell in line.cells.items():
        if column != AVERAGE:
            for seed, score in cell.scores.items():
                yield (column_label(column), seed), score


def _name(line: Line) -> str:
    key = line.key
    name = method_label(key.method, key.adapter, key.merge)
    return name if key.users == "one" else f"{key.users} {name}"
