"""The edge that all commands share: arguments, logging, messages, exit codes.

Nothing heavy: `--help` and `--version` answer at once.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import cola
from cola.cli.outcome import BAD_CONFIG, DONE, FAILED, INTERRUPTED
from cola.errors import ColaError, OffloadError, TrainingError

logger = logging.getLogger(__name__)


def command_parser(name: str, usage: str) -> argparse.ArgumentParser:
    """A parser with what every command has; `usage` is what follows the name."""
    parser = argparse.ArgumentParser(
        prog=name, add_help=False, allow_abbrev=False, usage=f"{name} {usage}"
    )
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    return parser


def run_console(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    help_text: Callable[[], str],
    action: Callable[[argparse.Namespace], int],
    interrupted: str = "interrupted",
) -> int:
    """Runs a command line and returns its exit code.

    Args:
        parser: of `command_parser`, with the command's own arguments.
        argv: arguments without the program's name; None: the process's own.
        help_text: what `--help` prints.
        action: the body; gets the arguments, returns the exit code.
        interrupted: what is said after Ctrl-C.
    """
    arguments = parser.parse_intermixed_args(argv)
    if arguments.help:
        sys.stdout.write(help_text())
        return DONE
    if arguments.version:
        sys.stdout.write(f"{parser.prog} {cola.__version__}\n")
        return DONE
    set_up_logging()
    try:
        return guard(parser.prog, lambda: action(arguments))
    except KeyboardInterrupt:
        logger.error(interrupted)
        return INTERRUPTED


def guard(name: str, action: Callable[[], int]) -> int:
    """Runs a command's action, errors become its exit code; an interruption passes through."""
    try:
        return action()
    except BrokenPipeError:  # the reader of the output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        return report_error(name, error)


def report_error(name: str, error: Exception) -> int:
    """Says what went wrong, with a traceback where that helps; returns the exit code.

    Args:
        name: of the command.
        error: as raised.
    """
    # The other errors of ours are found before training.
    if isinstance(error, ColaError) and not isinstance(error, OffloadError | TrainingError):
        sys.stderr.write(f"{name}: {error}\n")
        return BAD_CONFIG
    logger.error("run failed", exc_info=error)
    return FAILED


def set_up_logging() -> None:
    """Our messages from INFO on, those of libraries from WARNING on, to stderr."""
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.WARNING)
    logging.getLogger("cola").setLevel(logging.INFO)
    # peft 0.21 asks transformers 5.23 for an attribute by the name it is about to lose.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
