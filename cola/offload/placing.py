"""Which adapter is fitted where: devices, workers, and which adapters step together.

Sites of one block of the base model (query and value) travel together: their data arrives together,
and they share a hidden input that is then read once.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cola.config.choices import OffloadTarget, Payload, WireDType
from cola.config.schema import OffloadConfig
from cola.errors import ConfigError
from cola.offload.timing import relative_speeds
from cola.offload.transfer import Transfer
from cola.offload.worker import Backlog, InlineWorker, ThreadWorker, Worker
from cola.sites import SiteName
from cola.user_adapters import SiteAdapter, num_parameters

CORES_PER_WORKER = 2
"""Cores for every worker: more, smaller fits at a time keep the cores busier."""

CORES_PER_FIT = 3
"""Cores that one fit may use: more than its worker's share, since data arrives block by block, and
workers that wait for theirs leave cores idle. The sooner a fit ends, the less the next forward pass
waits for the last ones."""

STEPPED_TOGETHER = 1 << 20
"""Parameters up to which adapters of one worker step together: small ones step faster than a step
takes to call, large ones should step while the backward pass goes on."""


FITS_PER_GPU = 16
"""Parts in which a GPU fits the adapters of a step: few, for what is counted in together is few
kernels; many, for the next forward pass waits for the last part."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Adapters that step together, on their device.

    Attributes:
        adapters: by site.
        blocks: sites that travel together.
        gathers: whether data is counted in when that of all sites has been sent, or block by block.
        worker, transfer: who fits, and how data gets there.
        backlog: what waits for the worker: on a host of all its groups, whose fits it is busy with;
            a GPU's worker only issues them.
    """

    adapters: dict[SiteName, SiteAdapter]
    blocks: Sequence[Sequence[SiteName]]
    gathers: bool
    worker: Worker
    transfer: Transfer
    backlog: Backlog


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    """Where adapters are fitted, and how data gets there.

    Attributes:
        devices: where they are fitted; empty: on the base model's.
        workers: threads that fit on the host; None: by the machine's cores.
        staleness: adaptations that the base model may lag behind.
        drops_padding: whether rows of padding stay behind.
        wire_dtype: what data is rounded to on the wire; None: as the base has it.
        payload: what of a site leaves the base device.
        base_gradients: `payload=auto` may form any adapter's gradient there.
        num_rows: N, of a whole batch, for `payload=auto` to measure with.
    """

    devices: tuple[torch.device, ...] = ()
    workers: int | None = None
    staleness: int = 0
    drops_padding: bool = True
    wire_dtype: torch.dtype | None = None
    payload: Payload = Payload.factors
    base_gradients: bool = False
    num_rows: int = 1

    @property
    def overlaps(self) -> bool:
        """Whether fits run beside the base model, on a device of their own."""
        return bool(self.devices)

    def place(
        self, adapters: Mapping[SiteName, SiteAdapter], base: torch.device, dtype: torch.dtype
    ) -> list[Group]:
        """Moves adapters to where they are fitted.

        Spread by their number of parameters, which their fits take time in proportion to, and over
        several GPUs by how fast these are measured to be. Speeds are rounded, so that equal GPUs
        are equal in every run: which adapters are fitted in one product decides the last bits.

        Args:
            adapters: by site, in the order of the base model; taken over.
            base: device of the base model.
            dtype: of parameters and optimizer states.
        """
        blocks = blocks_of(list(adapters))
        if not self.overlaps:
            transfer = Transfer(base, base)
            owned = {site: adapter.to(base, dtype) for site, adapter in adapters.items()}
            inline = InlineWorker(base)
            return [_group(owned, blocks, inline, transfer, Backlog())]
        relative = relative_speeds(list(adapters.values()), self.devices, dtype, self.num_rows)
        places, speeds = [], []
        for device, speed in zip(self.devices, relative, strict=True):
            transfer = Transfer(base, device, wire_dtype=self.wire_dtype)
            for worker in self._workers(device):
                places.append((worker, transfer))
                speeds.append(speed)
        costs = [sum(num_parameters(adapters[site]) for site in block) for block in blocks]
        groups = []
        for (worker, transfer), own in zip(places, spread(costs, speeds), strict=True):
            if transfer.target.type == "cuda":
                runs = _parts([blocks[index] for index in own], FITS_PER_GPU)
            else:
                # The next forward pass waits for the first block: its fit does nothing else.
                alone = [[blocks[0]]] if 0 in own else []
                rest = _joined([(blocks[index], costs[index]) for index in own if index > 0])
                runs = alone + rest
            shared = Backlog()
            for run in runs:
                sites = itertools.chain(*run)
                owned = {site: adapters[site].to(transfer.target, dtype) for site in sites}
                backlog = Backlog() if transfer.target.type == "cuda" else shared
                groups.append(_group(owned, run, worker, transfer, backlog))
        return groups

    def _workers(self, device: torch.device) -> list[Worker]:
        if device.type == "cuda":
            return [ThreadWorker(f"offload-{device}", device, num_threads=1)]
        cores, num = torch.get_num_threads(), num_host_threads(self.workers)
        threads = max(cores // num, min(cores, CORES_PER_FIT))
        return [ThreadWorker(f"offload-{i}", device, num_threads=threads) for i in range(num)]


def resolve_offload(config: OffloadConfig, base: torch.device, *, num_rows: int) -> OffloadPlan:
    """The plan that a configuration means on this machine, with batches of `num_rows` rows.

    Raises:
        ConfigError: GPUs that this machine does not have, or that hold the base model.
    """
    devices: tuple[torch.device, ...] = ()
    if config.name is OffloadTarget.cpu:
        devices = (torch.device("cpu"),)
    elif config.name is OffloadTarget.gpu:
        devices = _gpus(config.device, base)
    wire_dtype = torch.bfloat16 if config.wire_dtype is WireDType.bfloat16 else None
    return OffloadPlan(
        devices=devices,
        workers=config.workers,
        staleness=config.staleness,
        drops_padding=config.drop_padding,
        wire_dtype=wire_dtype,
        payload=config.payload,
        base_gradients=config.base_gradients,
        num_rows=num_rows,
    )


def num_host_threads(workers: int | None) -> int:
    """Threads that fit on this host; `offload.workers`, if it is given."""
    return workers or max(1, torch.get_num_threads() // CORES_PER_WORKER)


def _gpus(names: Sequence[str] | None, base: torch.device) -> tuple[torch.device, ...]:
    num = torch.cuda.device_count()
    others = [torch.device("cuda", i) for i in range(num) if torch.device("cuda", i) != base]
    if base.type != "cuda" or not others:
        raise ConfigError(
            f"offload=gpu fits adapters on a GPU beside the base model's; the base is on {base} "
            f"and this machine has {num} GPUs: use offload=cpu or offload=none"
        )
    if names is None:
        return (others[0],)
    devices = tuple(torch.device(name) for name in names)
    for device in devices:
        if device not in others:
            allowed = ", ".join(str(other) for other in others)
            raise ConfigError(
                f"offload.device={device}: give GPUs of this machine that do not hold the base "
                f"model ({allowed})"
            )
    return devices


def _group(
    adapters: dict[SiteName, SiteAdapter],
    blocks: Sequence[Sequence[SiteName]],
    worker: Worker,
    transfer: Transfer,
    backlog: Backlog,
) -> Group:
    return Group(
        adapters=adapters,
        blocks=blocks,
        gathers=transfer.ends_on_gpu,
        worker=worker,
        transfer=transfer,
        backlog=backlog,
    )


def blocks_of(sites: Sequence[SiteName]) -> list[list[SiteName]]:
    """Neighbouring sites of one parent module; sites of the root stand alone."""
    named = ((site.rpartition(".")[0] or site, site) for site in sites)
    grouped = itertools.groupby(named, key=lambda pair: pair[0])
    return [[site for _, site in pairs] for _, pairs in grouped]


def spread(costs: Sequence[int], speeds: Sequence[float]) -> list[list[int]]:
    """Indices of the blocks of each place: a block goes where it will be done first.

    Data arrives in the order of the backward pass, the last first, so that neighbours, which arrive
    together, go to different places.

    Args:
        costs: of the blocks.
        speeds: of the places.
    """
    loads = [0] * len(speeds)
    places: list[list[int]] = [[] for _ in speeds]
    for index in reversed(range(len(costs))):
        done = [(load + costs[index]) / speed for load, speed in zip(loads, speeds, strict=True)]
        place = done.index(min(done))
        loads[place] += costs[index]
        places[place].insert(0, index)
    return places


def _parts(blocks: Sequence[list[SiteName]], num: int) -> list[list[list[SiteName]]]:
    """At most `num` runs of neighbouring blocks."""
    size = -(-len(blocks) // num) or 1
    return [list(blocks[start : start + size]) for start in range(0, len(blocks), size)]


def _joined(blocks: Sequence[tuple[list[SiteName], int]]) -> list[list[list[SiteName]]]:
    """Runs of blocks of one place whose adapters step together, given their parameters."""
    runs: list[list[list[SiteName]]] = []
    size = STEPPED_TOGETHER
    for block, cost in blocks:
        if size + cost > STEPPED_TOGETHER:
            runs.append([])
            size = 0
        runs[-1].append(block)
        size += cost
    return runs
