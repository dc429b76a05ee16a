"""Plain tables for a terminal."""

import sys
from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, text to the left and numbers to the right, as Markdown."""
    cells = [list(header), *map(list, rows)]
    # A rule needs a dash, and one more character for numbers.
    widths = [max(2, *(len(row[i]) for row in cells)) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rules = [
        "-" * (width - 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    ]
    return "\n".join([line(header), line(rules), *map(line, rows)])


def print_text(text: str) -> None:
    """Writes to standard output, where a command's result belongs; logs go to standard error."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").rstrip("%"))
    except ValueError:
        return cell in ("", "-")
    return True
