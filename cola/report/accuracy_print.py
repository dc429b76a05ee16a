"""An accuracy table as people and programs read it: cells in words, captions, and tidy records."""

from collections.abc import Iterator, Mapping, Sequence

from cola.grid import IMAGES, rows_of
from cola.report.accuracy import AccuracyTable, Cell, Line, Section
from cola.report.names import column_label, method_label, task_label
from cola.report.published import USER_TABLES
from cola.report.runs import BUILT_IN
from cola.report.table import MISSING, Mark, PrintedTable, Text

MODELS_TABLE = 9
"""Has three models, one below the other."""

TITLES = {
    2: "GLUE with RoBERTa base",
    3: "sequence to sequence with BART base",
    4: "users of Dolly with GPT-2",
    6: "Dolly with GPT-2",
    7: "Dolly with Llama-2 7B (query, value)",
    8: "users of Dolly with Llama-2 7B (all linear layers)",
    9: "images from scratch",
}

LEGEND = (
    "Scores in percent: mean ± standard deviation over seeds; best of a column bold, second best "
    "underlined; in parentheses the paper's value and ours minus it. ? marks a value of the paper "
    "that cannot be trusted; a dash is what was not run, or what the paper does not print."
)
_FACTS = {"metric": "metric", "reported on": "split", "selected on": "selected_on"}
_PAPER_EPOCHS = {True: 400, False: 40}  # images, text
_MARKS = {0: Mark.plain, 1: Mark.best, 2: Mark.second}


def printed(table: AccuracyTable) -> list[PrintedTable]:
    """Every section of a table, in words."""
    return [_printed(table.number, section) for section in table.sections]


def _printed(number: int, section: Section) -> PrintedTable:
    labels = _label_header(number)
    return PrintedTable(
        title=f"Table {number}, {TITLES[number]}: {conditions(number, section)}",
        header=(*labels, *map(column_label, section.columns), "trainable", "seeds"),
        num_labels=len(labels),
        lines=tuple(_words(number, section, line) for line in section.lines),
        notes=(*_how(section), *section.notes),
    )


def conditions(number: int, section: Section) -> str:
    """How a section's runs were made, and how the paper's; a stand-in says so first."""
    key = section.key
    if key is None:
        return "nothing was run"
    batch = "" if key.batch_size is None else f", batch size {key.batch_size}"
    ours = f"{key.length}{batch}"
    if key.stand_in:
        return f"STAND-IN, {key.stand_in}; {ours}"
    row = rows_of(f"table{number}")[0]
    paper = f"{_PAPER_EPOCHS[row.task in IMAGES]} epochs, batch size {row.batch_size}"
    return ours if ours == paper else f"{ours} (the paper: {paper})"


def _how(section: Section) -> Iterator[str]:
    """Metric, splits, seeds."""
    runs = section.runs
    if not runs:
        return
    for word, key in _FACTS.items():
        tasks: dict[str, set[str]] = {}
        for run in runs:
            tasks.setdefault(str(run.summary["result"][key]), set()).add(task_label(run.task))
        yield f"{word}: {'; '.join(_shared(tasks))}"
    seeds = sorted({run.seed for run in runs})
    yield f"runs: {len(runs)}; seeds: {', '.join(map(str, seeds))}"
    if any(run.data_dir not in ("", BUILT_IN) for run in runs):
        yield "data: a local folder's (data_dir), which may differ from the hub's"
    coarse = {run.model for run in runs if str(run.settings.get("model.tf32")).lower() == "true"}
    if coarse:
        yield f"products of TensorFloat-32 (model.tf32=true): {', '.join(sorted(coarse))}"
    if section.is_stand_in:
        yield "a stand-in's scores are no estimate of the paper's: its values are left out"


def _shared(tasks: Mapping[str, set[str]]) -> Iterator[str]:
    """What all tasks share, or whose each is."""
    for what, names in tasks.items():
        yield what if len(tasks) == 1 else f"{what} ({', '.join(sorted(names))})"


def _label_header(number: int) -> tuple[str, ...]:
    if number in USER_TABLES:
        return ("users", "method")
    return ("model", "method") if number == MODELS_TABLE else ("method",)


def _words(number: int, section: Section, line: Line) -> tuple[Text, ...]:
    key = line.key
    name = Text(main=method_label(key.method, key.adapter, key.merge))
    group = key.users if number in USER_TABLES else key.model
    labels = [Text(main=group), name] if len(_label_header(number)) > 1 else [name]
    counts = sorted({len(cell.scores) for cell in line.cells.values() if cell.scores})
    return (
        *labels,
        *(_score(line.cells[column]) for column in section.columns),
        _trainable(line, is_stand_in=section.is_stand_in),
        Text(main=_range(list(map(str, counts)))),
    )


def _trainable(line: Line, *, is_stand_in: bool) -> Text:
    ours = sorted({run.summary["trainable_parameters"] for run in line.runs})
    paper = "" if is_stand_in else f"({line.published.trainable:,})"
    return Text(main=_range([f"{count:,}" for count in ours]), rest=paper)


def _range(words: Sequence[str]) -> str:
    """The first and the last of sorted values, or the only one."""
    return " to ".join(dict.fromkeys((words[0], words[-1]))) if words else MISSING


def _score(cell: Cell) -> Text:
    doubt = "?" if cell.doubt else ""
    if cell.mean is None:
        return Text(rest=f"({cell.published}{doubt})" if cell.published else "")
    spread = "" if cell.spread is None else f" ± {cell.spread:.1f}"
    rest = "" if cell.difference is None else f"({cell.published}{doubt}, {cell.difference:+.1f})"
    return Text(main=f"{cell.mean:.1f}{spread}", rest=rest, mark=_MARKS[cell.rank])


def records(table: AccuracyTable) -> list[dict[str, object]]:
    """One record for every cell, named as in the paper's own file; numbers in percent."""
    return [
        {
            "table": table.number,
            "section": conditions(table.number, section),
            "stand_in": section.key.stand_in if section.key else "",
            "model": line.key.model,
            "method": line.key.method,
            "adapter": line.key.adapter,
            "merge": line.key.merge,
            "users": line.key.users,
            "column": column,
            "metric": cell.runs[0].metric if cell.runs else "",
            "split": cell.runs[0].summary["result"]["split"] if cell.runs else "",
            "selected_on": cell.runs[0].summary["result"]["selected_on"] if cell.runs else "",
            "seeds": len(cell.scores),
            "mean": cell.mean,
            "standard_deviation": cell.spread,
            "rank": cell.rank or None,
            "published": cell.published,
            "difference": cell.difference,
        }
        for section in table.sections
        for line in section.lines
        for column, cell in line.cells.items()
    ]
