"""`cola-report`: tables, figures and a page of finished runs, beside the paper's numbers."""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cola.cli.console import command_parser, run_console
from cola.cli.outcome import DONE
from cola.config.keys import nearest_words
from cola.errors import ConfigError, DataError
from cola.report.content import COST_TABLES, FIGURES, Content, Wanted, build_content
from cola.report.finding import Found, find
from cola.report.grid_state import RowState, count_grid, list_grid
from cola.report.published import TABLES
from cola.report.text import print_text
from cola.report.write import FORMATS, accuracy_markdown, costs_markdown, write_report

logger = logging.getLogger(__name__)

NAME = "cola-report"
OUTPUTS = Path("outputs")

_HELP = f"""\
usage: {NAME} [options] [PATH ...]

Tables and figures of finished runs beside the paper's numbers, and one page that holds them all.
PATH is a folder of runs (default: outputs), or a JSON file of cola-bench, of scripts/compare.py or
of {NAME} itself. Runs of other models or data than the paper's are stand-ins, which have
sections of their own.

Examples:
  {NAME}                                 # all that outputs holds, into outputs/report
  {NAME} --table 9 --table 2 outputs     # two tables, printed too; what was not run is a dash
  {NAME} --figure 10 --figure memory     # Figure 10, and accuracy against memory
  {NAME} --grid                          # every row of the paper: its command, its runs
  {NAME} docs/results --out page --format html

Options:
  -h, --help        this text
  --version         the package's version
  --table N         a table, {TABLES[0]} to {COST_TABLES[-1]}; several as 2,9; the next two alike
  --figure NAME     {", ".join(name.removeprefix("figure") for name in FIGURES)}
  --format NAME     {", ".join(FORMATS)} (default: all but json)
  --out FOLDER      where files go (default: outputs/report)
  --grid            list the paper's rows instead; with --table or --figure, theirs

Exit codes:
  0    done
  1    failed (traceback in the log)
  2    bad arguments, or no runs
  130  interrupted
"""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A checked command line."""

    paths: tuple[Path, ...]
    tables: frozenset[int] | None
    figures: frozenset[str] | None
    formats: tuple[str, ...]
    folder: Path
    lists_grid: bool


def run_report(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: arguments without the program's name; None: the process's own.
    """
    parser = command_parser(NAME, "[options] [PATH ...]")
    parser.add_argument("--table", action="append")
    parser.add_argument("--figure", action="append")
    parser.add_argument("--format", action="append")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "report")
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("paths", nargs="*", type=Path)
    return run_console(
        parser,
        argv,
        help_text=lambda: _HELP,
        action=lambda arguments: _report(_check(arguments)),
    )


def main() -> int:
    """Console script."""
    return run_report()


def _check(arguments: argparse.Namespace) -> _Request:
    numbers = [str(number) for number in (*TABLES, *COST_TABLES)]
    tables = _chosen("--table", arguments.table, numbers, lambda w: w.removeprefix("table"))
    names = [name.removeprefix("figure") for name in FIGURES]
    figures = _chosen("--figure", arguments.figure, names, lambda w: w.removeprefix("figure"))
    formats = _chosen("--format", arguments.format, FORMATS, str)
    return _Request(
        paths=tuple(arguments.paths or [OUTPUTS]),
        tables=None if tables is None else frozenset(map(int, tables)),
        figures=None if figures is None else frozenset(map(_figure, figures)),
        formats=tuple(formats or [name for name in FORMATS if name != "json"]),
        folder=arguments.out,
        lists_grid=arguments.grid,
    )


def _chosen(
    option: str, words: Sequence[str] | None, allowed: Sequence[str], plain: Callable[[str], str]
) -> list[str] | None:
    """Values of an option that may be given several times, or as a list with commas."""
    if words is None:
        return None
    values = [plain(value) for word in words for value in word.split(",")]
    for value in values:
        if value not in allowed:
            raise ConfigError(
                f"{option} {value}: not one of them; {nearest_words(value, allowed)}allowed: "
                f"{', '.join(allowed)}"
            )
    return values


def _figure(word: str) -> str:
    return f"figure{word}" if word.isdigit() else word


def _report(request: _Request) -> int:
    found = find(_existing(request))
    for message in found.broken:
        logger.warning("left out: %s", message)
    draws = not request.lists_grid and bool({"png", "svg", "html"} & set(request.formats))
    wanted = Wanted(tables=request.tables, figures=request.figures, draws=draws)
    if request.lists_grid:
        content = build_content(found, Wanted(tables=frozenset(), draws=False))
        print_text(list_grid(_asked_for(content.states, request)))
        return DONE
    if found.is_empty and request.tables is None:
        raise DataError(_nothing(request, found))
    content = build_content(found, wanted)
    written = write_report(content, found, request.folder, request.formats)
    if request.tables is not None:
        _print_tables(content)
    print_text(_outcome(content, found, request.folder, len(written)))
    return DONE


def _existing(request: _Request) -> Sequence[Path]:
    """The paths; a folder that was only assumed need not be there."""
    is_assumed = request.paths == (OUTPUTS,)
    return [] if is_assumed and not OUTPUTS.exists() else request.paths


def _nothing(request: _Request, found: Found) -> str:
    where = ", ".join(map(str, request.paths))
    going = f" ({len(found.unfinished)} have not finished)" if found.unfinished else ""
    broken = f"; cannot be read: {'; '.join(found.broken)}" if found.broken else ""
    return (
        f"no finished runs in {where}{going}{broken}; cola-train leaves them in outputs, "
        f"{NAME} --grid lists the paper's with their commands"
    )


def _asked_for(states: Sequence[RowState], request: _Request) -> list[RowState]:
    if request.tables is None and request.figures is None:
        return list(states)
    names = {f"table{number}" for number in request.tables or ()} | (request.figures or frozenset())
    return [state for state in states if names & set(state.row.shown_in)]


def _print_tables(content: Content) -> None:
    for shown in content.accuracy:
        print_text(accuracy_markdown(shown))
    for costs in content.costs:
        print_text(costs_markdown(costs))


def _outcome(content: Content, found: Found, folder: Path, num_files: int) -> str:
    """One paragraph: what was found, what is shown, where it is."""
    tables = [shown.scores.number for shown in content.accuracy]
    tables += [costs.number for costs in content.costs if costs.number]
    counts = {
        "finished runs": len(found.runs),
        "measurements": len(found.bench_rows),
        "unfinished runs": len(found.unfinished),
        "left out": len(found.broken),
        "figures": len(content.figures),
        f"files in {folder}": num_files,
    }
    words = ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
    shown = ", ".join(map(str, tables)) or "none"
    return f"{words}\ntables: {shown}; the paper's grid: {count_grid(content.states)}"
