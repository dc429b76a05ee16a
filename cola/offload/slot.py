"""A slot: adapters that step together, their worker, and what is under way for them."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cola.adaptation_data import Parcel
from cola.errors import ColaError, OffloadError
from cola.offload.deliveries import (
    Call,
    Factors,
    Former,
    Gradient,
    send_factors,
    send_gradient,
)
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

PREPARED_BYTES = 4 << 20
"""Hidden inputs from this size on are worth a task of their own before their gradients come."""


@dataclass(frozen=True, kw_only=True)
class Berth:
    """Where the adapters of one fitter are fitted.

    Attributes:
        fitter: owns the adapters.
        worker: runs everything that touches them.
        transfer: between the base device and the worker's.
        blocks: the fitter's sites, by whose data travels together.
        gathers: whether data is counted in when that of all sites has been sent, or block by block.
    """

    fitter: Fitter
    worker: Worker
    transfer: Transfer
    blocks: Sequence[Sequence[SiteName]]
    gathers: bool = False


@dataclass
class _Block:
    """Sites that travel together, and what has not left, or has not been prepared, yet."""

    open: set[SiteName]
    num_sites: int
    calls: list[tuple[Call, Former | None]] = field(default_factory=list)
    inputs: list[tuple[SiteName, Parcel]] = field(default_factory=list)


@dataclass
class _Sent:
    """What was sent and has not been handed to the worker."""

    sites: list[SiteName] = field(default_factory=list)
    factors: list[Factors] = field(default_factory=list)
    gradients: list[Gradient] = field(default_factory=list)


Counted = torch.cuda.Event | None
"""When data will have been counted in, on a GPU."""


class _Edition(NamedTuple):
    """What was published after an adaptation.

    Attributes:
        round: by site.
        issued: when it will have been written, on a GPU.
    """

    round: Round
    issued: torch.cuda.Event | None


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
        self._gathers = berth.gathers
        self._sent = _Sent()
        self._pending: list[tuple[set[SiteName], Future[Counted]]] = []  # since the last fit
        self._prepared: list[Future[None]] = []  # since data was handed over
        blocks = [_Block(set(sites), len(sites)) for sites in berth.blocks]
        self._blocks = {
            site: block for sites, block in zip(berth.blocks, blocks, strict=True) for site in sites
        }
        self._all = blocks
        self._published: dict[int, Future[_Edition]] = {}
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
            block.inputs.clear()

    def ran(self, site: SiteName, hidden_input: Parcel, num_bytes: int) -> None:
        """A site's hidden input has left in the forward pass, in which a host's workers idle.

        Its block's are prepared together: sites that share one read it once.
        """
        if not self.transfer.crosses or self.transfer.ends_on_gpu or num_bytes < PREPARED_BYTES:
            return
        block = self._blocks[site]
        block.inputs.append((site, hidden_input))
        if len(block.inputs) < block.num_sites:
            return
        inputs, block.inputs = block.inputs, []

        def run() -> None:
            with _named(site for site, _ in inputs):
                self.fitter.prepare([(site, parcel()) for site, parcel in inputs])
            inputs.clear()  # the task outlives its data

        self._prepared.append(self._worker.submit(run))

    def put(self, call: Call, former: Former | None) -> None:
        """Takes one call of a site; a former makes its gradient before it leaves.

        Waits while `MAX_PENDING` earlier batches are still under way, so that memory stays bounded
        when fits are slower than the base model.
        """
        site = call.spec.name
        if not self._overlaps:  # here already: no wire and no queue
            with _named([site]):
                self.fitter.accumulate([call.receive()])
            return
        under_way = [future for sites, future in self._pending if site in sites]
        if len(under_way) >= MAX_PENDING:
            under_way[-MAX_PENDING].result()
        block = self._blocks[site]
        block.calls.append((call, former))
        if len(block.calls) >= block.num_sites:
            self._send(block)

    def close(self, site: SiteName) -> None:
        """The site's data of this step is complete."""
        block = self._blocks[site]
        block.open.discard(site)
        if not block.open:
            self._send(block)
        if self.is_complete:
            self._hand_over()

    def flush(self) -> None:
        """Lets everything leave, complete or not."""
        for block in self._all:
            self._send(block)
        self._hand_over()

    def fit(self, fit: Fit, clip_factor: float | Tensor) -> None:
        """Starts a fit of all data that was handed over since the last one."""
        arrived = [future for _, future in self._pending]
        previous = self._published[self.version]
        self._pending = []

        def run() -> _Edition:
            # Earlier tasks of this slot ran on the same worker: these calls never wait, they raise
            # what went wrong, so that no adapter is stepped on half of its data.
            for future in arrived:
                future.result()
            published, issued = previous.result()
            if issued is not None:
                # No host waits for another GPU otherwise: they would be ahead of it by more and
                # more adaptations, whose data fills its memory.
                issued.synchronize()
            with _named(self.fitter.adapters):
                stepped = self.fitter.step(fit, clip_factor)
                news = self._publish({site: self.fitter.adapters[site] for site in stepped})
                return _Edition(published | news, self.transfer.issued())

        self.version = fit.number
        self._published[fit.number] = self._worker.submit(run)
        for version in [v for v in self._published if v < fit.number - self._staleness]:
            del self._published[version]

    def republish(self, version: int) -> None:
        """Publishes what the adapters are now, after they were changed from outside."""
        ready: Future[_Edition] = Future()
        ready.set_result(_Edition(self._publish(self.fitter.adapters), None))
        self.transfer.settle()  # the worker goes on from what was changed here
        self.version, self._published = version, {version: ready}

    def is_ready(self, version: int) -> bool:
        """Whether `published` would return at once."""
        return version in self._published and self._published[version].done()

    def published(self, version: int) -> Round:
        """What was published after an adaptation, by site; waits until its fit has ended.

        On a GPU the fit may still be under way: what is issued next, at either end, comes after it.
        """
        edition = self._published[version].result()
        self.transfer.follow(edition.issued)
        return edition.round

    def await_data(self) -> None:
        """Returns when all data is counted in and no fit is under way; raises what went wrong."""
        self.flush()
        for _, future in self._pending:
            self.transfer.follow(future.result())
        self.published(self.version)

    def _send(self, block: _Block) -> None:
        """Sends what a block has collected."""
        if not block.calls:
            return
        calls, block.calls = block.calls, []
        sites = [call.spec.name for call, _ in calls]
        with _named(sites):
            plain = [call for call, former in calls if former is None]
            self._sent.factors += send_factors(plain, self.transfer)
            self._sent.gradients += [
                send_gradient(call, former, self.transfer)
                for call, former in calls
                if former is not None
            ]
        self._sent.sites += sites
        if not self._gathers:
            self._hand_over()

    def _hand_over(self) -> None:
        """Lets the worker count in what was sent, when it arrives."""
        if not self._sent.sites:
            return
        sent, self._sent = self._sent, _Sent()
        prepared, self._prepared = self._prepared, []

        def run() -> Counted:
            for future in prepared:  # an earlier task of this worker: it raises, and never waits
                future.result()
            with _named(sent.sites):
                self.fitter.accumulate([one.receive() for one in sent.factors])
                for gradient in sent.gradients:
                    gradient.receive()
            sent.factors.clear()  # the task outlives its data
            sent.gradients.clear()
            return self.transfer.issued()

        self._pending.append((set(sent.sites), self._worker.submit(run)))


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
