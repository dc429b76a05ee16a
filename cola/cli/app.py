"""The edge that all commands share: arguments, logging, run folder, exit codes.

Everything heavy (torch, transformers) is imported by a command's `execute`, after the configuration
was composed and checked: help and configuration errors answer at once.
"""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cola
from cola.cli.help import help_text
from cola.cli.outcome import BAD_CONFIG, DONE, FAILED, INTERRUPTED, Outcome
from cola.config.schema import ExperimentConfig
from cola.errors import ColaError, ConfigError, OffloadError, TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One console script.

    Attributes:
        name: as typed.
        summary: what it does, for the help.
        examples: command lines for the help.
        execute: the body; gets a valid configuration and the run's folder, returns whether it
            went well. A module-level function, since sweep launchers pickle it.
        writes_run: whether it writes a run's folder (and can resume one).
        failure: what exit code 1 also means, for the help.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    execute: Callable[[ExperimentConfig, Path], bool]
    writes_run: bool
    failure: str = ""


def run_command(command: Command, argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        command: which one.
        argv: arguments without the program's name; None: the process's own.
    """
    arguments = _parse(command, argv)
    if arguments.help:
        sys.stdout.write(
            help_text(command.name, command.summary, command.examples, command.failure)
        )
        return DONE
    if arguments.version:
        sys.stdout.write(f"{command.name} {cola.__version__}\n")
        return DONE
    set_up_logging()
    try:
        return guard(command.name, lambda: _dispatch(command, arguments))
    except KeyboardInterrupt:
        logger.error("interrupted")
        return INTERRUPTED


def _parse(command: Command, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command.name,
        add_help=False,
        allow_abbrev=False,
        usage=f"{command.name} [options] [group=choice ...] [key=value ...] (see --help)",
    )
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args(argv)


def _dispatch(command: Command, arguments: argparse.Namespace) -> int:
    # Hydra takes 0.5 s to import, which --help and --version need not wait for.
    from cola.config.identity import config_yaml
    from cola.config.store import compose_run

    if arguments.multirun:
        from cola.cli.sweep import run_sweep

        return run_sweep(command, arguments.overrides)
    run = compose_run(arguments.overrides)
    if arguments.cfg:
        sys.stdout.write(config_yaml(run.config))
        return DONE
    return execute_run(command, run.config, run.given, run.run_dir).exit_code


def execute_run(
    command: Command, config: ExperimentConfig, given: frozenset[str], run_dir: Path
) -> Outcome:
    """Runs one valid configuration, alone or as a job of a sweep.

    Args:
        command: which one.
        config: valid, defaults filled in.
        given: groups and keys set explicitly.
        run_dir: the run's folder; made here if the command writes one.
    """
    if config.dry_run:
        from cola.dry_run import print_dry_run

        print_dry_run(config)
        return Outcome(exit_code=DONE)
    if not command.writes_run:
        if config.resume is not None:
            raise ConfigError(
                f"resume={config.resume}: {command.name} resumes no run; leave it out"
            )
        return Outcome(exit_code=DONE if command.execute(config, run_dir) else FAILED)

    from cola.config.claim import claim_run
    from cola.config.resume import ONCE, finished_run, resolve_resume

    with claim_run(config, run_dir) as is_ours:
        if config.resume == ONCE and not is_ours:
            return skip(f"another process is at this run, below {run_dir.parent}")
        if config.resume is not None and not is_ours:
            raise ConfigError(
                f"resume={config.resume}: another process is at this run; wait for it, or stop it"
            )
        if config.resume == ONCE and (done := finished_run(config, run_dir)):
            return skip("finished already", done)
        config, run_dir = resolve_resume(config, given, run_dir)
        _refuse_used_folder(config, run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            went_well = command.execute(config, run_dir)
            return Outcome(exit_code=DONE if went_well else FAILED, folder=run_dir)
        finally:
            remove_if_empty(run_dir)


def skip(reason: str, folder: Path | None = None) -> Outcome:
    """A run of `resume=once` that has nothing to do, said in one line."""
    outcome = Outcome(exit_code=DONE, is_skipped=True, reason=reason, folder=folder)
    logger.info("resume=once: %s", outcome.line)
    return outcome


def _refuse_used_folder(config: ExperimentConfig, run_dir: Path) -> None:
    from cola.config.identity import CONFIG_FILE

    if config.resume is None and (run_dir / CONFIG_FILE).exists():
        raise ConfigError(
            f"hydra.run.dir={run_dir}: holds a run already; go on with it by "
            f"resume={run_dir}, or choose another folder"
        )


def remove_if_empty(folder: Path) -> None:
    """Removes a run's folder that nothing was written to (bad data, dry run, resumed elsewhere)."""
    with contextlib.suppress(OSError):  # not empty, or not there
        folder.rmdir()


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
