"""`hydra/launcher=parallel`: jobs of a sweep beside one another, each on a GPU or on the CPU.

In this folder, and importing nothing heavy, because Hydra finds launchers by importing whatever
lies in the namespace package `hydra_plugins`. The work is done by `cola/cli/job_queue.py`.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from cola.cli.outcome import Outcome


@dataclass
class ParallelLauncherConf:
    """The keys below `hydra.launcher`.

    Attributes:
        jobs: at a time in all; null: as many as there are cores, or as the GPUs take.
        devices: auto (all visible GPUs, else the CPU), cpu, or a list of GPUs.
        jobs_per_device: at a time on one GPU.
        memory_gib: of its device's memory that one job needs, to share a device by memory.
    """

    _target_: str = f"{__name__}.ParallelLauncher"
    jobs: int | None = None
    devices: Any = "auto"
    jobs_per_device: int | None = None
    memory_gib: float | None = None


ConfigStore.instance().store(
    group="hydra/launcher", name="parallel", node=ParallelLauncherConf, provider="cola"
)


class ParallelLauncher(Launcher):
    """Differs from Hydra's joblib launcher: a device for every job, and no job ends another."""

    def __init__(self, **settings: Any) -> None:
        values = OmegaConf.to_container(OmegaConf.create(settings))
        self._settings = cast(dict[str, Any], values)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Takes what Hydra gives a launcher."""
        self._hydra_context = hydra_context
        self._task_function = task_function
        self._config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs the jobs; results in their order, an `Outcome` each."""
        from cola.cli.job_queue import Job, JobQueue
        from cola.cli.slots import SlotSettings, plan_slots

        slots = plan_slots(
            SlotSettings(**self._settings),
            num_jobs=len(job_overrides),
            given_device=_given_device(job_overrides),
        )
        logs = new_log_folder(Path(self._config.hydra.sweep.dir, "sweeps"))
        jobs = [
            Job(
                words=" ".join(overrides),
                run=functools.partial(
                    _run_in_process,
                    hydra_context=self._hydra_context,
                    task_function=self._task_function,
                    config=self._config,
                    singletons=Singleton.get_state(),
                    overrides=list(overrides),
                    number=number,
                ),
                log=logs / f"{number + 1}.log",
            )
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        return [
            _job_return(job, outcome)
            for job, outcome in zip(job_overrides, JobQueue(jobs, slots).run(), strict=True)
        ]


def new_log_folder(parent: Path) -> Path:
    """A folder of its own, named by the second; another sweep may have begun in the same one."""
    moment = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = parent / (moment if number == 1 else f"{moment}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("numbers do not end")


def _given_device(job_overrides: Sequence[Sequence[str]]) -> str | None:
    """Values of `device` that overrides set, in words; None where none does."""
    given = {line for job in job_overrides for line in job if line.startswith("device=")}
    return ",".join(sorted(line.removeprefix("device=") for line in given)) or None


def _run_in_process(
    *,
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    singletons: Any,
    overrides: list[str],
    number: int,
) -> "Outcome":
    """One job, in a process that knows nothing of Hydra's state here but what is passed."""
    setup_globals()
    Singleton.set_state(singletons)
    job_config = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(job_config):
        job_config.hydra.job.id = job_config.hydra.job.num = number
    result = run_job(
        hydra_context=hydra_context,
        task_function=task_function,
        config=job_config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    outcome: Outcome = result.return_value
    return outcome


def _job_return(overrides: Sequence[str], outcome: "Outcome") -> JobReturn:
    result = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    result.return_value = outcome
    return result
