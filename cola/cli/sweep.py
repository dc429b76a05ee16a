"""Sweeps: `-m` with several values runs every combination through Hydra's launcher.

Differs from Hydra's own sweeper, which stops at the first bad job: here each job is validated
before anything starts, bad ones are reported and the rest goes on. Launchers are Hydra's, so
parallel ones work as with any Hydra application.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
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
    BAD_CONFIG,
    DONE,
    FAILED,
    Command,
    execute_run,
    guard,
    remove_if_empty,
    set_up_logging,
)
from cola.config.overrides import check_overrides, is_hydra_line
from cola.config.store import CONFIG_NAME, compose_run, explain, hydra_session
from cola.errors import ConfigError

logger = logging.getLogger(__name__)

_REASONS = {FAILED: "run failed", BAD_CONFIG: "bad configuration or data"}


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """How one job ended."""

    overrides: Sequence[str]
    exit_code: int


def run_sweep(command: Command, overrides: Sequence[str]) -> int:
    """Runs every combination; returns 0, 1 if a job failed, 2 if jobs were only badly configured.

    Raises:
        ConfigError: the sweep itself cannot be read (an unknown key, a launcher that is missing).
    """
    lines = check_overrides(overrides, is_sweep=True).lines
    hydra_lines = [line for line in lines if is_hydra_line(line)]
    try:
        with hydra_session() as hydra:
            master = hydra.compose_config(CONFIG_NAME, lines, run_mode=RunMode.MULTIRUN)
            jobs = _expand(hydra, master, lines)
            outcomes = [_validate(command, job, hydra_lines) for job in jobs]
            good = [job for job, outcome in zip(jobs, outcomes, strict=True) if outcome is None]
            codes = iter(_launch(command, hydra, master, good) if good else [])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None
    return _report(
        [
            outcome or _Outcome(overrides=job, exit_code=next(codes))
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]
    )


def _expand(hydra: Hydra, master: DictConfig, lines: Sequence[str]) -> list[list[str]]:
    """Overrides of every job; an experiment's file may hold sweeps in `hydra.sweeper.params`."""
    sweeper = master.hydra.sweeper
    if not sweeper["_target_"].endswith(f".{BasicSweeper.__name__}"):
        raise ConfigError("hydra/sweeper: only basic is supported; it runs every combination")
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    parsed = parser.parse_overrides([*params, *(x for x in lines if not is_hydra_line(x))])
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def _validate(command: Command, job: Sequence[str], hydra_lines: Sequence[str]) -> _Outcome | None:
    """The outcome of a job that cannot be composed (its reason goes to stderr), or None."""

    def compose() -> int:
        compose_run([*hydra_lines, *job])
        return DONE

    code = guard(command.name, compose)
    return None if code == DONE else _Outcome(overrides=job, exit_code=code)


def _launch(
    command: Command, hydra: Hydra, master: DictConfig, jobs: Sequence[Sequence[str]]
) -> list[int]:
    """Exit codes of the jobs, in order; the launcher decides where and how many at a time."""
    logger.info("sweep: jobs to run: %d", len(jobs))
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(master)),
        task_function=functools.partial(run_job, command),
        config=master,
    )
    return [_exit_code(result) for result in launcher.launch(jobs, initial_job_idx=0)]


def run_job(command: Command, _: DictConfig) -> int:
    """One job, in the process that the launcher chose; Hydra has made the run's folder already."""
    set_up_logging()
    hydra: Any = HydraConfig.get()
    lines = [*hydra.overrides.hydra, *hydra.overrides.task]
    run_dir = Path(hydra.runtime.output_dir)
    logger.info("sweep: job %s: %s", hydra.job.num, " ".join(hydra.overrides.task))

    def run() -> int:
        composed = compose_run(lines)
        return execute_run(command, composed.config, composed.given, run_dir)

    try:
        return guard(command.name, run)
    finally:
        remove_if_empty(run_dir)  # bad data, a dry run, or resumed in an older folder


def _exit_code(result: JobReturn) -> int:
    # A job that could not even start (its folder cannot be made) has an exception for a result.
    if result.status is JobStatus.COMPLETED:
        return int(result.return_value)
    return FAILED


def _report(outcomes: Sequence[_Outcome]) -> int:
    """Logs the final line and returns the sweep's exit code."""
    failed = [outcome for outcome in outcomes if outcome.exit_code != DONE]
    done = len(outcomes) - len(failed)
    if not failed:
        logger.info("sweep: all %d jobs done", done)
        return DONE
    words = "; ".join(
        f"{' '.join(f.overrides) or 'defaults'} ({_REASONS[f.exit_code]})" for f in failed
    )
    logger.error("sweep: %d of %d jobs done; failed: %s", done, len(outcomes), words)
    return FAILED if any(f.exit_code == FAILED for f in failed) else BAD_CONFIG
