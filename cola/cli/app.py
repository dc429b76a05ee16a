"""What the commands share that compose a run: its folder, sweeps, `--cfg`.

Everything heavy (torch, transformers) is imported by a command's `execute`, after the configuration
was composed and checked: help and configuration errors answer at once.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cola.cli.console import command_parser, run_console
from cola.cli.help import help_text
from cola.cli.outcome import DONE, FAILED, Outcome
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError

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
    usage = "[options] [group=choice ...] [key=value ...] (see --help)"
    parser = command_parser(command.name, usage)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("overrides", nargs="*")
    return run_console(
        parser,
        argv,
        help_text=lambda: help_text(
            command.name, command.summary, command.examples, command.failure
        ),
        action=lambda arguments: _dispatch(command, arguments),
    )


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
