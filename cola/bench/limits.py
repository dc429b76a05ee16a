"""What does not fit: found before the host's memory is gone, or told apart from other failures."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from cola.adapter_plan import plan_adapters
from cola.bench.row import BenchRow
from cola.bench.subjects import devices_of
from cola.config.choices import MergeMode, OffloadTarget, Pristine
from cola.meters import count_bytes
from cola.models import BaseModel

GIB = 2**30
FLOAT32_BYTES = 4

_CGROUP = Path("/sys/fs/cgroup")
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory")


def check_host_memory(row: BenchRow, base: BaseModel) -> None:
    """Refuses a row whose adapters exceed the host's memory: Linux would end the process.

    Raises:
        MemoryError: adapters, gradients and optimizer states, with pristine weights, are too large.
    """
    if not row.is_cola:
        return
    on_host = row.config.offload.name is OffloadTarget.cpu or devices_of(row, base)[0].type == "cpu"
    needed = 0
    if on_host:
        plan = plan_adapters(row.config, base.sites)
        needed += FLOAT32_BYTES * (plan.num_stacked + plan.num_fitted + plan.num_moments)
    merge = row.config.merge
    if merge.mode is MergeMode.merged and merge.pristine is Pristine.host:
        module = base.module
        needed += count_bytes(
            module.get_submodule(site).get_parameter("weight") for site in base.sites
        )
    free = free_host_bytes()
    if needed > free:
        raise MemoryError(
            f"{needed / GIB:.0f} GiB of host memory for adapters, gradients, optimizer states and "
            f"pristine weights; {free / GIB:.0f} GiB are free"
        )


def free_host_bytes() -> int:
    """Memory that this process may still take, of the machine or of its container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except OSError:  # no container, or an older kind
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def does_not_fit(error: BaseException) -> bool:
    """Whether an error says that memory of a device or of the host is gone."""
    return any(
        isinstance(one, MemoryError | torch.OutOfMemoryError)
        or (isinstance(one, RuntimeError) and any(word in str(one).lower() for word in _WORDS))
        for one in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from: a worker wraps what it met."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
