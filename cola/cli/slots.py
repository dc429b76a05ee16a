"""Where the jobs of a parallel sweep may run: devices, and how many jobs at a time on each.

A slot is a process that sees one GPU and no other (`CUDA_VISIBLE_DEVICES`), so that `device=auto`
means its own: the configuration and its hash do not depend on where a job ran, and no library makes
a context on another job's GPU.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor

from cola.errors import ConfigError

_GIB = 2**30
_KEY = "hydra.launcher"
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Room for one job at a time.

    Attributes:
        device: of its jobs, for the log.
        environment: variables of its process, set before anything is imported there.
    """

    device: str
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SlotSettings:
    """What the launcher's keys say, see `hydra_plugins.cola_parallel`.

    Attributes:
        jobs: at a time in all; None: as many as fit.
        devices: `auto`, `cpu`, or names of GPUs.
        jobs_per_device: at a time on one GPU; None: one, or what `memory_gib` leaves room for.
        memory_gib: of its device's memory that one job needs; None: not counted.
    """

    jobs: int | None
    devices: str | Sequence[str]
    jobs_per_device: int | None
    memory_gib: float | None

    def __post_init__(self) -> None:
        for name in ("jobs", "jobs_per_device", "memory_gib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{_KEY}.{name}={value}: must be positive; or leave it out")
        if self.jobs_per_device and self.memory_gib:
            raise ConfigError(
                f"{_KEY}.jobs_per_device={self.jobs_per_device} and {_KEY}.memory_gib="
                f"{self.memory_gib}: both say how many jobs share a GPU; give one of them"
            )


def plan_slots(settings: SlotSettings, *, num_jobs: int, given_device: str | None) -> list[Slot]:
    """A slot for every job that runs at a time, devices in turn.

    Args:
        settings: of the launcher.
        num_jobs: of the sweep; more slots than that are not made.
        given_device: the command line's own `device`, which jobs keep.

    Raises:
        ConfigError: settings that contradict one another, or what this machine does not have.
    """
    if given_device is not None:
        if settings.devices != "auto":
            raise ConfigError(
                f"device={given_device} and {_KEY}.devices: both say where jobs run; give one"
            )
        num = _num_on_cpu(settings) if given_device == "cpu" else settings.jobs or 1
        places = [(given_device, dict[str, str]())] * num
    else:
        gpus = _chosen_gpus(settings.devices)
        places = _on_gpus(gpus, settings) if gpus else _on_cpu(settings)
    places = places[: min(settings.jobs or num_jobs, num_jobs)]
    threads = str(max(1, cpu_count() // len(places)))
    # What the user set is kept; bars of several jobs would overwrite one another.
    common = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), "TQDM_DISABLE": "1"}
    return [Slot(device=device, environment=common | own) for device, own in places]


def _on_cpu(settings: SlotSettings) -> list[tuple[str, dict[str, str]]]:
    return [("cpu", {"CUDA_VISIBLE_DEVICES": ""})] * _num_on_cpu(settings)


def _num_on_cpu(settings: SlotSettings) -> int:
    """By the cores, and by memory if a job says how much it needs."""
    num = settings.jobs or cpu_count()
    if settings.memory_gib:
        free = psutil.virtual_memory().available / _GIB
        num = min(num, _num_that_fit("cpu", free, settings.memory_gib))
    return int(num)


def _on_gpus(gpus: Sequence[int], settings: SlotSettings) -> list[tuple[str, dict[str, str]]]:
    counts = dict.fromkeys(gpus, settings.jobs_per_device or 1)
    if settings.memory_gib:
        free = _in_spare_process(_free_gib)
        counts = {i: _num_that_fit(f"cuda:{i}", free[i], settings.memory_gib) for i in gpus}
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = dict(enumerate(names)) if names != [""] else {}
    # Devices in turn, so that the first jobs spread over all of them.
    turns = itertools.chain.from_iterable(
        [gpu for gpu in gpus if counts[gpu] > turn] for turn in range(max(counts.values()))
    )
    return [(f"cuda:{i}", {"CUDA_VISIBLE_DEVICES": visible.get(i, str(i))}) for i in turns]


def _num_that_fit(device: str, free_gib: float, needed_gib: float) -> int:
    num = int(free_gib / needed_gib)
    if num == 0:
        raise ConfigError(
            f"{_KEY}.memory_gib={needed_gib}: {device} has {free_gib:.1f} GiB free; free some, "
            f"leave it out of {_KEY}.devices, or give what a job needs"
        )
    return num


def _chosen_gpus(devices: str | Sequence[str]) -> list[int]:
    """Indices of GPUs; empty: jobs run on the CPU."""
    if devices in ("cpu", ["cpu"]):
        return []
    num_gpus = _in_spare_process(_num_gpus)
    if devices == "auto":
        return list(range(num_gpus))
    names = [devices] if isinstance(devices, str) else devices
    known = [f"cuda:{index}" for index in range(num_gpus)]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{_KEY}.devices: this machine has no '{name}'; give auto, cpu, or a list of GPUs "
                f"({', '.join(known) or 'it has none'})"
            )
    return [known.index(name) for name in dict.fromkeys(names)]


def _in_spare_process(question: Callable[[], _Answer]) -> _Answer:
    """Asks where torch may be imported and GPUs be touched without keeping either."""
    with ProcessPoolExecutor(max_workers=1) as pool:
        answer: Any = pool.submit(question).result()
    return answer  # type: ignore[no-any-return]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _free_gib() -> list[float]:
    import torch

    return [torch.cuda.mem_get_info(i)[0] / _GIB for i in range(torch.cuda.device_count())]
