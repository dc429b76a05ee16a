"""Which worker owns which adapter, and which version of it the base model may use.

The fleet is the base model's whole view of the offload side: adaptation data goes in (`put`,
`close`), parameters of a numbered adaptation come out (`wait`). Algorithm 1, lines 9 to 16.
"""

import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.config.choices import ClipMode
from cola.config.schema import OptimizerConfig
from cola.errors import ColaError, OffloadError
from cola.meters import add_held
from cola.offload.fitter import Fit, Fitter
from cola.offload.local_users import LocalUsers
from cola.offload.transfer import Parcel, Transfer
from cola.offload.worker import Worker
from cola.sites import SiteName
from cola.user_adapters import SiteAdapter

Published = Mapping[str, Tensor]
Publish = Callable[[SiteAdapter], Published]

MAX_PENDING_PER_SITE = 2
"""Batches of one site that may wait for its worker before the base model has to."""


@dataclass
class _Slot:
    """Adapters that step together, their worker, and what is under way for them."""

    fitter: Fitter
    worker: Worker
    version: int
    published: "Future[dict[SiteName, Published]]"
    pending: "list[Future[None]]" = field(default_factory=list)  # data since the last fit


class _StagedBytes:
    """Adaptation data that left the base model and has not been accumulated yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.peak = self.total = 0

    def add(self, num: int) -> None:
        with self._lock:
            self.now += num
            self.total += max(num, 0)
            self.peak = max(self.peak, self.now)


class Fleet:
    """Adapters of all sites, spread over workers."""

    def __init__(
        self,
        fitters: Sequence[Fitter],
        workers: Sequence[Worker],
        *,
        transfer: Transfer,
        publish: Publish,
        optimizer: OptimizerConfig,
        overlaps: bool,
        local: LocalUsers | None = None,
    ) -> None:
        """Takes over the fitters and publishes version 0.

        Args:
            fitters: in the order of the base model's forward pass; of one site each if fits
                overlap.
            workers: who runs fits; fitters are dealt out in turn.
            transfer: how adaptation data reaches the workers' device.
            publish: what the base device needs of a fitted adapter.
            optimizer: for its clipping across sites.
            overlaps: whether a fit may run beside the backward pass. If not, adapters are stepped
                after it, so that the base model may use the very tensors that are stepped.
            local: users who fit in processes of their own.
        """
        self._publish = publish
        self._transfer = transfer
        self._slots = [
            _Slot(fitter, workers[index % len(workers)], 0, self._ready(fitter))
            for index, fitter in enumerate(fitters)
        ]
        self._slot_of = {site: slot for slot in self._slots for site in slot.fitter.adapters}
        self._workers = list(workers)
        self._global_clip = optimizer.clip_norm if optimizer.clip is ClipMode["global"] else None
        self._overlaps = overlaps
        self._local = local
        self._staged = _StagedBytes()
        self._fit: Fit | None = None

    def begin_step(self, fit: Fit | None) -> None:
        """Announces a batch. With `fit`, its data completes an interval: fits follow."""
        self._fit = fit

    def put(self, site: SiteName, data: AdaptationData) -> None:
        """Sends one batch of a site to its worker, which adds it to the gradient.

        Waits while `MAX_PENDING_PER_SITE` earlier ones of this site are still under way, so that
        memory stays bounded when fits are slower than the base model.
        """
        slot = self._slot_of[site]
        if not self._overlaps:  # here already: no copy, no queue
            with _named([site]):
                slot.fitter.accumulate(site, data)
            return
        if len(slot.pending) >= MAX_PENDING_PER_SITE:
            slot.pending[-MAX_PENDING_PER_SITE].result()
        parcel = self._transfer.send(data)
        self._staged.add(data.num_bytes)
        slot.pending.append(slot.worker.submit(lambda: self._accumulate(slot, site, parcel)))

    def close(self, site: SiteName) -> None:
        """The site's data of this step is complete; starts its fit unless a barrier bars it."""
        if self._fit is not None and self._overlaps and not self._has_barrier:
            self._submit_fit(self._slot_of[site], self._fit, 1.0)

    def finish(self) -> None:
        """Starts the fits that `close` could not.

        These are sites whose last batch brought no gradient, and all sites behind a barrier:
        clipping by the global norm, users who fit elsewhere and are waited for here, or adapters on
        the base device.
        """
        assert self._fit is not None
        if self._local is not None and self._local.are_present:
            self._await_data()
            self._local.hand_over(self._fit)
            self._local.collect(self._fit.number)
        factor: float | Tensor = 1.0
        if self._global_clip is not None:
            factor = self._global_clip_factor(self._global_clip, self._fit)
        for slot in self._slots:
            if slot.version < self._fit.number:
                self._submit_fit(slot, self._fit, factor)

    def wait(self, site: SiteName, version: int) -> Published:
        """What was published for a site after an adaptation; waits until its fit has ended."""
        slot = self._slot_of[site]
        assert slot.version == version, f"{site}: version {slot.version}, wanted {version}"
        return slot.published.result()[site]

    def drain(self) -> None:
        """Returns when everything under way has ended; raises what went wrong in it."""
        for slot in self._slots:
            for future in slot.pending:
                future.result()
            slot.published.result()
            slot.fitter.check_finite(slot.version)

    def stop(self) -> None:
        """Ends the workers, and users' own processes."""
        if self._local is not None:
            self._local.close()
        for worker in self._workers:
            worker.stop()

    @contextmanager
    def drained(self) -> Iterator[dict[SiteName, SiteAdapter]]:
        """The adapters by site, with nothing under way."""
        self.drain()
        yield {s: adapter for slot in self._slots for s, adapter in slot.fitter.adapters.items()}

    def busy_seconds(self) -> float:
        """Time spent in fits, summed over workers."""
        return sum(worker.busy_seconds() for worker in self._workers)

    def waited_seconds(self) -> float:
        """Time that `finish` waited for users' own processes."""
        return 0.0 if self._local is None else self._local.waited_seconds

    def wire_bytes(self, returned_bytes: int) -> int:
        """Bytes moved so far, parameters returned included; none if adapters stay."""
        return self._staged.total + returned_bytes if self._overlaps else 0

    def held_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes of adapters, optimizer states and staging (peak), by device."""
        held: dict[str, dict[str, int]] = {}
        for slot in self._slots:
            for owner, num in slot.fitter.held_bytes.items():
                add_held(held, slot.fitter.device, owner, num)
        add_held(held, slot.fitter.device, "staging", self._staged.peak)
        return held

    def state_dict(self) -> dict[str, Any]:
        """State of every fitter; nothing may be under way."""
        return {site: slot.fitter.state_dict(site) for site, slot in self._slot_of.items()}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        """Continues after adaptation number `version`, and publishes it."""
        self.drain()
        for slot in self._slots:
            slot.fitter.load_state_dict(state)
        self.republish(version)

    def republish(self, version: int) -> None:
        """Publishes what the adapters are now, after they were changed from outside."""
        for slot in self._slots:
            slot.version, slot.published = version, self._ready(slot.fitter)

    def _deliver(self, adapter: SiteAdapter) -> Published:
        """Line 15: what the base device needs, where it fetches it from."""
        return self._transfer.stage(self._publish(adapter))

    def _ready(self, fitter: Fitter) -> "Future[dict[SiteName, Published]]":
        future: Future[dict[SiteName, Published]] = Future()
        future.set_result({s: self._deliver(adapter) for s, adapter in fitter.adapters.items()})
        return future

    def _accumulate(self, slot: _Slot, site: SiteName, parcel: Parcel) -> None:
        with _named([site]):
            data = parcel()
            slot.fitter.accumulate(site, data)
            self._staged.add(-data.num_bytes)

    def _submit_fit(self, slot: _Slot, fit: Fit, clip_factor: float | Tensor) -> None:
        arrived, previous = slot.pending, slot.published
        slot.pending, slot.version = [], fit.number

        def run() -> dict[SiteName, Published]:
            # Earlier tasks of this slot ran on the same worker: these calls never wait, they raise
            # what went wrong, so that no adapter is stepped on half of its data.
            for future in arrived:
                future.result()
            published = previous.result()
            adapters = slot.fitter.adapters
            with _named(adapters):
                stepped = slot.fitter.step(fit, clip_factor)
                return published | {site: self._deliver(adapters[site]) for site in stepped}

        slot.published = slot.worker.submit(run)

    @property
    def _has_barrier(self) -> bool:
        """Whether no fit may start before the data of all sites is complete."""
        has_local = self._local is not None and self._local.are_present
        return self._global_clip is not None or has_local

    def _await_data(self) -> None:
        """The barrier: what has arrived is counted in, and the fits before are over."""
        for slot in self._slots:
            for future in slot.pending:
                future.result()
            slot.published.result()

    def _global_clip_factor(self, clip_norm: float, fit: Fit) -> Tensor:
        """Over all sites, a scalar; over each user's own, (K,)."""
        self._await_data()
        norms = torch.stack(
            [slot.fitter.gradient_norm(s, fit) for s, slot in self._slot_of.items()]
        )
        # A site whose gradient is not finite stops by itself; it must not spoil the others.
        norm = torch.linalg.vector_norm(torch.where(norms.isfinite(), norms, 0.0), dim=0)
        factor: Tensor = clip_norm / (norm + 1e-6)
        return factor.clamp(max=1.0)


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
