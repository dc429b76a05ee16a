"""Writes a report's files: tables, figures, the page, and the runs themselves."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cola.report.accuracy_print import LEGEND, records
from cola.report.bench_table import LEGEND as COSTS_LEGEND
from cola.report.bench_table import cost_records
from cola.report.content import Content, ShownAccuracy, ShownCosts
from cola.report.finding import RUNS_FILE, Found, runs_json
from cola.report.page import render_page
from cola.report.style import save_figure
from cola.report.table import to_latex, to_markdown

FORMATS = ("md", "csv", "tex", "png", "svg", "html", "json")
TITLE = "ColA: results beside the paper's"


def write_report(
    content: Content, found: Found, folder: Path, formats: Sequence[str]
) -> list[Path]:
    """Writes what was asked for; a figure that has nothing to show has no file.

    Args:
        content: what is shown.
        found: what there was.
        folder: made here.
        formats: of `FORMATS`.

    Returns:
        The files.
    """
    texts: dict[str, str] = {}
    for shown in content.accuracy:
        name = f"table{shown.scores.number}"
        texts |= {
            f"{name}.md": accuracy_markdown(shown),
            f"{name}.csv": _csv(records(shown.scores)),
            f"{name}.tex": to_latex(section.table for section in shown.sections),
        }
    for costs in content.costs:
        name = f"table{costs.number}" if costs.number else "measurements"
        texts |= {
            f"{name}.md": costs_markdown(costs),
            f"{name}.csv": _csv(cost_records(costs.rows)),
            f"{name}.tex": to_latex((*costs.measured, *costs.missing)),
        }
    if "html" in formats:
        texts["index.html"] = render_page(content, found, TITLE)
    if "json" in formats and found.runs:
        texts[RUNS_FILE] = runs_json(found.runs)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in texts.items():
        if name.rpartition(".")[2] in formats and text:
            (folder / name).write_text(text, encoding="utf-8")
            written.append(folder / name)
    for kind in ("png", "svg"):
        if kind in formats:
            written += [
                save_figure(figure.figure, folder / "figures" / f"{figure.name}.{kind}")
                for figure in content.figures
            ]
    return written


def accuracy_markdown(shown: ShownAccuracy) -> str:
    """A table's sections, each followed by its paired statistics."""
    tables = [
        table
        for section in shown.sections
        for table in (section.table, section.pairs)
        if table is not None
    ]
    return f"{to_markdown(tables)}\n\n{LEGEND}\n"


def costs_markdown(costs: ShownCosts) -> str:
    """A computation table's sections, what is missing last."""
    return f"{to_markdown((*costs.measured, *costs.missing))}\n\n{COSTS_LEGEND}\n"


def _csv(lines: Iterable[Mapping[str, Any]]) -> str:
    found = list(lines)
    if not found:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()
