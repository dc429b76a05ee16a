"""A slot: adapters that step together, their worker, and what is under way for them."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from cola.errors import ColaError, OffloadError
from cola.offload.deliveries import Call, Former, send_factors, send_gradient
from cola.offload.fit import Fit, Fitter
from cola.offload.transfer import Transfer
from cola.offload.worker import Worker
from cola.sites import SiteName
from cola.user_adapters import SiteAdapter

Published = Mapping[str, Tensor]
Round = dict[SiteName, Published]
Publish = Callable[[Mapping[SiteName, SiteAdapter]], Round]

MAX_PENDING = 2
"""Batches of one block that may wait for its worker before the base model has to."""


@dataclass(frozen=True, kw_only=True)
class Berth:
    """Where the adapters of one fitter are fitted.

    Attributes:
        fitter: owns the adapters.
        worker: runs everything that touches them.
        transfer: between the base device and the worker's.
        blocks: the fitter's sites, by whose data travels and is counted in together.
    """

    fitter: Fitter
    worker: Worker
    transfer: Transfer
    blocks: Sequence[Sequence[SiteName]]


@dataclass
class _Block:
    """Sites that travel together, and their calls that have not left yet."""

    open: set[SiteName]
    num_sites: int
    calls: list[tuple[Call, Former | None]] = field(default_factory=list)
    pending: "list[Future[None]]" = field(default_factory=list)  # handed over since the last fit


class Slot:
    """The adapters of one fitter on their worker.

    Attributes:
        fitter: owns the adapters.
        transfer: between the base device and the worker's.
        version: of the newest fit that was started.
    """

    def __init__(self, berth: Berth, publish: Publish, *, overlaps: bool, staleness: int) -> None:
        """Publishes version 0.

        Args:
            berth: who fits where.
            publish: what the base device needs of a fitted adapter.
            overlaps: whether tasks are queued to run beside the backward pass.
            staleness: how many fits the parameters that are asked for may lag behind.
        """
        self.fitter, self.transfer = berth.fitter, berth.transfer
        self.version = 0
        self._worker = berth.worker
        self._publish = publish
        self._overlaps, self._staleness = overlaps, staleness
        blocks = [_Block(set(sites), len(sites)) for sites in berth.blocks]
        self._blocks = {
            site: block for sites, block in zip(berth.blocks, blocks, strict=True) for site in sites
        }
        self._all = blocks
        self._published: dict[int, Future[Round]] = {}
        self.republish(0)

    @property
    def is_complete(self) -> bool:
        """Whether every site has closed in this step."""
        return not any(block.open for block in self._all)

    def begin_step(self) -> None:
        """A new batch; what has not left of the last one does now."""
        self.flush()
        for site, block in self._blocks.items():
            block.open.add(site)

    def put(self, call: Call, former: Former | None) -> None:
        """Takes one call of a site; a former makes its gradient before it leaves.

        Waits while `MAX_PENDING` earlier batches are still under way, so that memory stays bounded
        when fits are slower than the base model.
        """
        block = self._blocks[call.spec.name]
        if len(block.pending) >= MAX_PENDING:
            block.pending[-MAX_PENDING].result()
        block.calls.append((call, former))
        # What is fitted on the base device is there already, and need not wait for others.
        if not self._overlaps or len(block.calls) >= block.num_sites:
            self._hand_over(block)

    def close(self, site: SiteName) -> None:
        """The site's data of this step is complete."""
        block = self._blocks[site]
        block.open.discard(site)
        if not block.open:
            self._hand_over(block)

    def flush(self) -> None:
        """Lets everything leave, complete or not."""
        for block in self._all:
            self._hand_over(block)

    def fit(self, fit: Fit, clip_factor: float | Tensor) -> None:
        """Starts a fit of all data that was handed over since the last one."""
        arrived = [future for block in self._all for future in block.pending]
        previous = self._published[self.version]
        for block in self._all:
            block.pending = []

        def run() -> Round:
            # Earlier tasks of this slot ran on the same worker: these calls never wait, they raise
            # what went wrong, so that no adapter is stepped on half of its data.
            for future in arrived:
                future.result()
            published = previous.result()
            with _named(self.fitter.adapters):
                stepped = self.fitter.step(fit, clip_factor)
                news = self._publish({site: self.fitter.adapters[site] for site in stepped})
                self.transfer.settle()
                return published | news

        self.version = fit.number
        self._published[fit.number] = self._worker.submit(run)
        for version in [v for v in self._published if v < fit.number - self._staleness]:
            del self._published[version]

    def republish(self, version: int) -> None:
        """Publishes what the adapters are now, after they were changed from outside."""
        ready: Future[Round] = Future()
        ready.set_result(self._publish(self.fitter.adapters))
        self.version, self._published = version, {version: ready}

    def is_ready(self, version: int) -> bool:
        """Whether `published` would return at once."""
        return self._published[version].done()

    def published(self, version: int) -> Round:
        """What was published after an adaptation, by site; waits until its fit has ended."""
        return self._published[version].result()

    def await_data(self) -> None:
        """Returns when all data is counted in and no fit is under way; raises what went wrong."""
        self.flush()
        for block in self._all:
            for future in block.pending:
                future.result()
        self.published(self.version)

    def _hand_over(self, block: _Block) -> None:
        """Sends what a block has collected, and lets the worker count it in when it arrives."""
        if not block.calls:
            return
        calls, block.calls = block.calls, []
        sites = [call.spec.name for call, _ in calls]
        with _named(sites):
            factors = send_factors(
                [call for call, former in calls if former is None], self.transfer
            )
            gradients = [
                send_gradient(call, former, self.transfer)
                for call, former in calls
                if former is not None
            ]

        def run() -> None:
            with _named(sites):
                self.fitter.accumulate([one.receive() for one in factors])
                for gradient in gradients:
                    gradient.receive()
            factors.clear()  # the task outlives its data
            gradients.clear()

        if self._overlaps:
            block.pending.append(self._worker.submit(run))
        else:
            run()


@contextmanager
def _named(sites: Iterable[SiteName]) -> Iterator[None]:
    """Turns a crash inside a task into an error that names the site and keeps the traceback."""
    try:
        yield
    except ColaError:
        raise
    except Exception as error:
        names = ", ".join(repr(site) for site in sites)
        raise OffloadError(f"fitting site {names} failed:\n{traceback.format_exc()}") from error
