"""A printed table, and the same table as Markdown or LaTeX; the page's template makes it HTML."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from cola.report.text import format_table

MISSING = "-"


class Mark(Enum):
    """How a cell stands out."""

    plain = "plain"
    best = "best"
    second = "second"
    aside = "aside"  # a row that is not the paper's


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a cell says: `main`, which stands out as `mark` says, and what follows it unmarked."""

    main: str = MISSING
    rest: str = ""
    mark: Mark = Mark.plain


@dataclass(frozen=True, kw_only=True)
class PrintedTable:
    """One table.

    Attributes:
        title: what it shows.
        header: of every column.
        num_labels: columns on the left that name a row; rows that agree in the first of several
            belong together.
        lines: cells, as many as the header has.
        notes: sentences below it.
    """

    title: str
    header: tuple[str, ...]
    num_labels: int
    lines: tuple[tuple[Text, ...], ...]
    notes: tuple[str, ...] = ()


_MARKDOWN = {
    Mark.plain: "{}",
    Mark.best: "**{}**",
    Mark.second: "<ins>{}</ins>",  # what GitHub shows underlined
    Mark.aside: "*{}*",
}
_LATEX = {
    Mark.plain: "{}",
    Mark.best: r"\textbf{{{}}}",
    Mark.second: r"\underline{{{}}}",
    Mark.aside: r"\textit{{{}}}",
}
_LATEX_CHARACTERS = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def to_markdown(tables: Iterable[PrintedTable]) -> str:
    """Tables one below the other, each with its title and its notes."""
    return "\n\n".join(map(_markdown, tables))


def _markdown(table: PrintedTable) -> str:
    cells = [
        [f"{_MARKDOWN[cell.mark].format(cell.main)} {cell.rest}".strip() for cell in line]
        for line in table.lines
    ]
    notes = "\n".join(f"- {note}" for note in table.notes)
    parts = [f"**{table.title}**", format_table(table.header, cells), *([notes] if notes else [])]
    return "\n\n".join(parts)


def to_latex(tables: Iterable[PrintedTable]) -> str:
    """`table` environments for a document that loads booktabs."""
    return "\n".join(map(_latex, tables))


def _latex(table: PrintedTable) -> str:
    columns = "l" * table.num_labels + "r" * (len(table.header) - table.num_labels)
    body = [r"\midrule", _latex_line(map(_latex_cell, table.lines[0]))]
    for before, line in pairwise(table.lines):
        if table.num_labels > 1 and before[0] != line[0]:
            body.append(r"\midrule")
        body.append(_latex_line(map(_latex_cell, line)))
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_escape('; '.join((table.title, *table.notes)))}}}",
            r"\centering\footnotesize",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _latex_line(map(_escape, table.header)),
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(cell: Text) -> str:
    return f"{_LATEX[cell.mark].format(_escape(cell.main))} {_escape(cell.rest)}".strip()


def _escape(text: str) -> str:
    return text.translate(_LATEX_CHARACTERS)
