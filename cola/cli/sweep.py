"""Sweeps: `-m` with several values runs every combination through Hydra's launcher.

Differs from Hydra's own sweeper, which stops at the first bad job: here each job is validated
before anything starts, bad ones are reported and the rest goes on. Launchers are Hydra's, so
parallel ones work as with any Hydra application; `hydra_plugins/cola_parallel.py` is our own.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cola.cli.app import (
    Command,
    execute_run,
    remove_if_empty,
    skip,
)
from cola.cli.console import report_error, set_up_logging
from cola.cli.outcome import FAILED, Outcome, report_sweep
from cola.config.overrides import check_overrides, is_hydra_line
from cola.config.resume import ONCE, finished_run
from cola.config.store import CONFIG_NAME, compose_run, explain, hydra_session
from cola.errors import ColaError, ConfigError

logger = logging.getLogger(__name__)

# Where a job of the sweep will write, and so where its earlier runs are.
_RUN_DIR = "hydra.run.dir=${hydra.sweep.dir}/${hydra.sweep.subdir}"


def run_sweep(
    command: Command, overrides: Sequence[str], *, rows: Sequence[Sequence[str]] = ((),)
) -> int:
    """Runs every combination; returns 0, 1 if a job failed, 2 if jobs were only badly configured.

    Args:
        command: which one.
        overrides: of all jobs, several values where a sweep is meant.
        rows: overrides of single values that are no product; every combination runs for each.

    Raises:
        ConfigError: the sweep itself cannot be read (an unknown key, a launcher that is missing).
    """
    lines = check_overrides(overrides, is_sweep=True).lines
    hydra_lines = [line for line in lines if is_hydra_line(line)]
    try:
        with hydra_session() as hydra:
            master = hydra.compose_config(CONFIG_NAME, lines, run_mode=RunMode.MULTIRUN)
            jobs = [[*row, *job] for row in rows for job in _expand(hydra, master, lines)]
            outcomes = [_without_running(command, job, hydra_lines) for job in jobs]
            left = [job for job, outcome in zip(jobs, outcomes, strict=True) if outcome is None]
            launched = iter(_launch(command, hydra, master, left) if left else [])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None
    return report_sweep(jobs, [outcome or next(launched) for outcome in outcomes])


def finished_job(overrides: Sequence[str]) -> Path | None:
    """The folder in which a job of a sweep has been run to its end; None where it has not.

    Args:
        overrides: of the job, with the sweep's own for Hydra.
    """
    run = compose_run([_RUN_DIR, *overrides])
    return finished_run(run.config, run.run_dir)


def _expand(hydra: Hydra, master: DictConfig, lines: Sequence[str]) -> list[list[str]]:
    """Overrides of every job; an experiment's file may hold sweeps in `hydra.sweeper.params`."""
    sweeper = master.hydra.sweeper
    if not sweeper["_target_"].endswith(f".{BasicSweeper.__name__}"):
        raise ConfigError("hydra/sweeper: only basic is supported; it runs every combination")
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    parsed = parser.parse_overrides([*params, *(x for x in lines if not is_hydra_line(x))])
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def _without_running(
    command: Command, job: Sequence[str], hydra_lines: Sequence[str]
) -> Outcome | None:
    """The outcome of a job that cannot be composed, or has nothing to do; None of one to run."""
    try:
        run = compose_run([*hydra_lines, _RUN_DIR, *job])
    except Exception as error:
        return _failure(command, error)
    if run.config.resume == ONCE and command.writes_run and not run.config.dry_run:
        done = finished_run(run.config, run.run_dir)
        return skip("finished already", done) if done else None
    return None


def _failure(command: Command, error: Exception, folder: Path | None = None) -> Outcome:
    """Says what went wrong, and keeps its first line for the end of the sweep."""
    kind = "" if isinstance(error, ColaError) else f"{type(error).__name__}: "
    reason = kind + next(iter(str(error).splitlines()), "")
    return Outcome(exit_code=report_error(command.name, error), reason=reason, folder=folder)


def _launch(
    command: Command, hydra: Hydra, master: DictConfig, jobs: Sequence[Sequence[str]]
) -> list[Outcome]:
    """Outcomes of the jobs, in order; the launcher decides where and how many at a time."""
    logger.info("sweep: jobs to run: %d", len(jobs))
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(master)),
        task_function=functools.partial(run_job, command),
        config=master,
    )
    return [_outcome(result) for result in launcher.launch(jobs, initial_job_idx=0)]


def run_job(command: Command, _: DictConfig) -> Outcome:
    """One job, in the process that the launcher chose; Hydra has made the run's folder already."""
    set_up_logging()
    hydra: Any = HydraConfig.get()
    lines = [*hydra.overrides.hydra, *hydra.overrides.task]
    run_dir = Path(hydra.runtime.output_dir)
    logger.info("sweep: job %s: %s", hydra.job.num + 1, " ".join(hydra.overrides.task))
    try:
        composed = compose_run(lines)
        return execute_run(command, composed.config, composed.given, run_dir)
    except Exception as error:
        return _failure(command, error)
    finally:
        remove_if_empty(run_dir)  # bad data, a dry run, or resumed in an older folder


def _outcome(result: JobReturn) -> Outcome:
    # A job that could not even start (its folder cannot be made) has an exception for a result.
    if result.status is JobStatus.COMPLETED:
        outcome: Outcome = result.return_value
        return outcome
    return Outcome(exit_code=FAILED, reason=str(result._return_value))
