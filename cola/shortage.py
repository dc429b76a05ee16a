"""Whether what a run holds fits into what is free, told before anything is built."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from cola.adapter_plan import plan_adapters
from cola.config.choices import MethodName, OffloadTarget
from cola.config.schema import ExperimentConfig
from cola.config.user_settings import UserSettings
from cola.memory_plan import Memory, plan_memory, weight_bytes
from cola.models import BaseModel
from cola.offload.placing import resolve_offload

GIB = 2**30

_CGROUP = Path("/sys/fs/cgroup")


def shortages(
    config: ExperimentConfig,
    base: BaseModel,
    device: torch.device,
    *,
    users: Sequence[UserSettings] = (),
) -> list[str]:
    """What gradient learning needs of the host's and the GPUs' memory where less is free.

    Linux ends a process that takes more, after a while in which nothing goes on; a GPU refuses, but
    only after adapters have been built on the host, which for large ones takes minutes. What a step
    computes comes on top. And what is free is not always told: some virtual machines get more as it
    is used.

    Args:
        config: of a run; methods without gradient learning are not told about.
        base: still on the host, or on its device.
        device: that.
        users: with adapters of their own, as the data has them.
    """
    if config.method.name is not MethodName.cola:
        return []
    memory = plan_memory(config, base, plan_adapters(config, base.sites, users))
    found = [_host_shortage(config, base, device, memory)]
    if device.type == "cuda":
        found.append(_gpu_shortage(config, base, device, memory))
    return [shortage for shortage in found if shortage is not None]


def _host_shortage(
    config: ExperimentConfig, base: BaseModel, device: torch.device, memory: Memory
) -> str | None:
    owners = {} if config.offload.name is OffloadTarget.gpu else memory.get("host", {})
    needed, free = sum(owners.values()), free_host_bytes()
    if device.type == "cpu":
        needed += sum(memory["base"].values()) - weight_bytes(base)
    elif next(base.module.parameters()).device.type == "cpu":
        free += weight_bytes(base)  # about to leave
    if needed <= free:
        return None
    return (
        f"{needed / GIB:.1f} GiB of host memory for adapters, gradients, optimizer states and "
        f"weights to merge; {free / GIB:.1f} GiB are free: use a smaller adapter, as "
        "adapter=lowrank, fewer model.sites, or offload=gpu"
    )


def _gpu_shortage(
    config: ExperimentConfig, base: BaseModel, device: torch.device, memory: Memory
) -> str | None:
    """Of the base model's GPU, and of those where adapters are fitted, together."""
    is_there = next(base.module.parameters()).device == device
    needed = sum(memory["base"].values()) - (weight_bytes(base) if is_there else 0)
    wanted: dict[tuple[torch.device, ...], int] = {(device,): needed}
    if config.offload.name is OffloadTarget.gpu:
        others = resolve_offload(config.offload, device, num_rows=1).devices
        wanted[others] = sum(memory["host"].values())
    for devices, num_bytes in wanted.items():
        free = sum(torch.cuda.mem_get_info(one)[0] for one in devices)
        if num_bytes > free:
            names = " and ".join(map(str, devices))
            return (
                f"{num_bytes / GIB:.1f} GiB of {names} for adapters, gradients, optimizer states "
                f"and weights; {free / GIB:.1f} GiB are free: use a smaller adapter, as "
                "adapter=lowrank, fewer model.sites, or another offload"
            )
    return None


def free_host_bytes() -> int:
    """Memory that this process may still take, of the machine or of its container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:  # no container, or an older kind
        return free
    if limit == "max":
        return free
    counts = dict(line.split() for line in lines)
    # Files that were read count as used, and go as soon as memory is asked for.
    files = sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
    return min(free, int(limit) - used + files)
