"""A slot: adapters that step together, their worker, and what is under way for them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cola.adaptation_data import Parcel
from cola.offload.deliveries import Call, Former
from cola.offload.fit import Fit, Fitter
from cola.offload.outbox import Outbox, named_failures
from cola.offload.transfer import Transfer
from cola.offload.worker import Backlog, Worker
from cola.sites import SiteName
from cola.user_adapters import SiteAdapter

Published = Mapping[str, Tensor]
Round = dict[SiteName, Published]
Publish = Callable[[Mapping[SiteName, SiteAdapter]], Round]


@dataclass(frozen=True, kw_only=True)
class Berth:
    """Where the adapters of one fitter are fitted.

    Attributes:
        fitter: owns the adapters.
        worker: runs everything that touches them.
        backlog: what waits for the worker; on a host of all its fitters.
        transfer: between the base device and the worker's.
        blocks: the fitter's sites, by whose data travels together.
        gathers: whether data is counted in when that of all sites has been sent, or block by block.
        is_first: whether the forward pass begins with these sites.
    """

    fitter: Fitter
    worker: Worker
    transfer: Transfer
    blocks: Sequence[Sequence[SiteName]]
    gathers: bool = False
    is_first: bool = False
    backlog: Backlog = field(default_factory=Backlog)


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
        self._worker, self._backlog = berth.worker, berth.backlog
        self._publish = publish
        self._overlaps, self._staleness = overlaps, staleness
        self._gathers = berth.gathers
        fitter = berth.fitter
        prepared = [site for site in fitter.adapters if fitter.can_prepare(site)]
        self._outbox = Outbox(berth.blocks, berth.transfer, prepared, is_first=berth.is_first)
        self._pending: list[Future[Counted]] = []  # since the last fit
        self._prepared: list[Future[None]] = []  # likewise
        self._published: dict[int, Future[_Edition]] = {}
        self.republish(0)

    @property
    def is_complete(self) -> bool:
        """Whether every site has closed in this step."""
        return self._outbox.is_complete

    def begin_step(self) -> None:
        """A new batch; what has not left of the last one does now."""
        self.flush()
        self._outbox.begin_step()

    def ran(self, site: SiteName, hidden_input: Parcel, num_bytes: int) -> None:
        """A site's hidden input is on its way; what can be done before its gradient comes, is."""
        inputs = self._outbox.add_input(site, hidden_input, num_bytes)
        if not inputs:
            return

        def run() -> None:
            with named_failures(site for site, _ in inputs):
                self.fitter.prepare([(site, parcel()) for site, parcel in inputs])
            inputs.clear()  # the task outlives its data

        self._prepared.append(self._worker.submit(run))

    def put(self, call: Call, former: Former | None) -> None:
        """Takes one call of a site; a former makes its gradient before it leaves.

        Waits while the worker is far behind, so that memory stays bounded when fits are slower than
        the base model.
        """
        site = call.spec.name
        if not self._overlaps:  # here already: no wire and no queue
            with named_failures([site]):
                self.fitter.accumulate([call.receive()])
            return
        self._backlog.make_room()
        if self._outbox.add(call, former) and not self._gathers:
            self._hand_over()

    def close(self, site: SiteName) -> None:
        """The site's data of this step is complete."""
        has_sent = self._outbox.close(site)
        if self.is_complete or (has_sent and not self._gathers):
            self._hand_over()

    def flush(self) -> None:
        """Lets everything leave, complete or not."""
        self._outbox.flush()
        self._hand_over()

    def fit(self, fit: Fit, clip_factor: float | Tensor) -> None:
        """Starts a fit of all data that was handed over since the last one."""
        arrived: list[Future[None] | Future[Counted]] = [*self._prepared]
        arrived += self._pending
        previous = self._published[self.version]
        self._prepared, self._pending = [], []

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
            with named_failures(self.fitter.adapters):
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
        for future in self._pending:
            self.transfer.follow(future.result())
        self.published(self.version)

    def _hand_over(self) -> None:
        """Lets the worker count in what was sent, when it arrives."""
        sent = self._outbox.take()
        if not sent.sites:
            return

        def run() -> Counted:
            sent.count_in(self.fitter)
            return self.transfer.issued()

        counted = self._worker.submit(run)
        self._backlog.add(counted)
        self._pending.append(counted)
