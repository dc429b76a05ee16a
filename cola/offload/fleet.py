"""Which worker owns which adapter, and which version of it the base model may use.

The fleet is the base model's whole view of the offload side: adaptation data goes in (`put`,
`close`), parameters of a numbered adaptation come out (`wait`). Algorithm 1, lines 9 to 16.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cola.adaptation_data import Parcel
from cola.config.choices import ClipMode, Payload
from cola.config.schema import OptimizerConfig
from cola.kept_rows import KeptRows
from cola.meters import add_held
from cola.offload.buffers import Buffers
from cola.offload.deliveries import Call, Former
from cola.offload.fit import Fit
from cola.offload.local_users import LocalUsers
from cola.offload.slot import Berth, Publish, Published, Slot
from cola.offload.transfer import Transfer, stay
from cola.site_calls import SiteRun
from cola.sites import SiteName
from cola.user_adapters import SiteAdapter
from cola.user_rows import UserRows


class Fleet:
    """Adapters of all sites, spread over workers.

    Attributes:
        overlaps: whether fits run beside the backward pass, on a device of their own.
    """

    def __init__(
        self,
        berths: Sequence[Berth],
        *,
        publish: Publish,
        optimizer: OptimizerConfig,
        overlaps: bool,
        staleness: int = 0,
        payloads: Mapping[SiteName, Payload] | None = None,
        formers: Mapping[SiteName, Former] | None = None,
        local: LocalUsers | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        """Takes over the fitters and publishes version 0.

        Args:
            berths: in the order of the base model's forward pass.
            publish: what the base device needs of a fitted adapter.
            optimizer: for its clipping across sites.
            overlaps: whether a fit may run beside the backward pass. If not, adapters are stepped
                after it, so that the base model may use the very tensors that are stepped.
            staleness: how many fits the parameters that are asked for may lag behind.
            payloads: what leaves the base device, by site; None: factors everywhere.
            formers: of the sites whose gradient can be formed on the base device.
            local: users who fit in processes of their own.
            buffers: host memory that the fitters share.
        """
        self._slots = [
            Slot(berth, publish, overlaps=overlaps, staleness=staleness) for berth in berths
        ]
        self._slot_of = {site: slot for slot in self._slots for site in slot.fitter.adapters}
        self._specs = {
            site: slot.fitter.adapters[site].spec for site, slot in self._slot_of.items()
        }
        self._workers = list({id(berth.worker): berth.worker for berth in berths}.values())
        self._transfers = list({id(berth.transfer): berth.transfer for berth in berths}.values())
        self._global_clip = optimizer.clip_norm if optimizer.clip is ClipMode["global"] else None
        self.overlaps = overlaps
        self._payloads = dict(payloads or dict.fromkeys(self._specs, Payload.factors))
        self._formers = dict(formers or {})
        self._local = local
        self._buffers = buffers or Buffers()
        self._fit: Fit | None = None

    def begin_step(self, fit: Fit | None) -> None:
        """Announces a batch. With `fit`, its data completes an interval: fits follow."""
        self._fit = fit
        for transfer in self._transfers:
            transfer.begin_step()
        for slot in self._slots:
            slot.begin_step()

    def begin_backward(self) -> None:
        """The forward pass is over: what it sent has long left, and the loss needs the memory."""
        for transfer in self._transfers:
            transfer.forget()

    def takes_early(self, site: SiteName) -> bool:
        """Hidden inputs leave at once if that takes them off the base device."""
        is_needed_there = self._payloads[site] is Payload.gradient
        return self._slot_of[site].transfer.crosses and not is_needed_there

    def send_inputs(self, runs: Sequence[SiteRun]) -> list[Parcel]:
        """Sends hidden inputs, those that come together by one copy, the same one once."""
        parcels: list[Parcel] = []
        for transfer, own in itertools.groupby(runs, key=lambda run: self._way(run.site)):
            named = [(self._specs[run.site], run) for run in own]
            if transfer is None:
                parcels += stay(named)
                continue
            sent = transfer.send_distinct(named)
            for (_, run), parcel in zip(named, sent, strict=True):
                self._slot_of[run.site].ran(run.site, parcel, run.num_bytes)
            parcels += sent
        return parcels

    def put(
        self,
        site: SiteName,
        hidden_input: Parcel,
        hidden_gradient: Tensor,
        kept: KeptRows | None,
        rows: UserRows | None,
    ) -> None:
        """Sends a hidden gradient after its input, or what both make of the adapter's gradient."""
        call = Call(
            spec=self._specs[site],
            hidden_input=hidden_input,
            hidden_gradient=hidden_gradient,
            kept=kept,
            rows=rows,
        )
        forms = self._payloads[site] is Payload.gradient
        self._slot_of[site].put(call, self._formers[site] if forms else None)

    def close(self, site: SiteName) -> None:
        """The site's data of this step is complete; a fit starts unless a barrier bars it."""
        slot = self._slot_of[site]
        slot.close(site)
        may_fit = self.overlaps and not self._has_barrier
        if self._fit is not None and may_fit and slot.is_complete:
            slot.fit(self._fit, 1.0)

    def finish(self) -> None:
        """Starts the fits that `close` could not.

        These are sites whose last batch brought no gradient, and all sites behind a barrier:
        clipping by the global norm, users who fit elsewhere and are waited for here, or adapters on
        the base device.
        """
        assert self._fit is not None
        for slot in self._slots:
            slot.flush()
        if self._local is not None and self._local.are_present:
            self._await_data()
            self._local.hand_over(self._fit)
            self._local.collect(self._fit.number)
        factor: float | Tensor = 1.0
        if self._global_clip is not None:
            factor = self._global_clip_factor(self._global_clip, self._fit)
        for slot in self._slots:
            if slot.version < self._fit.number:
                slot.fit(self._fit, factor)

    def ready(self, sites: Iterable[SiteName], version: int) -> list[SiteName]:
        """Those that `wait` would return at once."""
        by_slot = itertools.groupby(sites, key=self._slot_of.__getitem__)
        return [site for slot, own in by_slot if slot.is_ready(version) for site in own]

    def wait(self, sites: Iterable[SiteName], version: int) -> dict[SiteName, Published]:
        """What was published for sites after an adaptation; waits until their fits have ended."""
        found: dict[SiteName, Published] = {}
        for slot, own in itertools.groupby(sites, key=self._slot_of.__getitem__):
            published = slot.published(version)
            found.update((site, published[site]) for site in own)
        return found

    def drain(self) -> None:
        """Returns when everything under way has ended; raises what went wrong in it."""
        for slot in self._slots:
            slot.await_data()
            slot.fitter.check_finite(slot.version)
        for transfer in self._transfers:
            transfer.forget()

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
        sent = sum(transfer.staged.total for transfer in self._transfers)
        return sent + returned_bytes if self.overlaps else 0

    def held_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes of adapters, optimizer states and, at their peaks, staging and gradients."""
        held: dict[str, dict[str, int]] = {}
        for slot in self._slots:
            for owner, num in slot.fitter.held_bytes.items():
                add_held(held, slot.fitter.device, owner, num)
        for transfer in self._transfers:
            add_held(held, transfer.target, "staging", transfer.held_bytes)
        if self._buffers.peak_bytes:
            add_held(held, torch.device("cpu"), "gradients", self._buffers.peak_bytes)
        return held

    def state_dict(self) -> dict[str, Any]:
        """State of every fitter, and choices that were measured; nothing may be under way."""
        return {
            "sites": {site: slot.fitter.state_dict(site) for site, slot in self._slot_of.items()},
            "payloads": {site: payload.name for site, payload in self._payloads.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        """Continues after adaptation number `version`, and publishes it."""
        self.drain()
        for slot in self._slots:
            slot.fitter.load_state_dict(state["sites"])
        self._payloads = {site: Payload[name] for site, name in state["payloads"].items()}
        self.republish(version)

    def republish(self, version: int) -> None:
        """Publishes what the adapters are now, after they were changed from outside."""
        for slot in self._slots:
            slot.republish(version)

    def _way(self, site: SiteName) -> Transfer | None:
        """How a site's hidden inputs travel; None: they are needed where they are."""
        stays = not self.overlaps or self._payloads[site] is Payload.gradient
        return None if stays else self._slot_of[site].transfer

    @property
    def _has_barrier(self) -> bool:
        """Whether no fit may start before the data of all sites is complete."""
        has_local = self._local is not None and self._local.are_present
        return self._global_clip is not None or has_local

    def _await_data(self) -> None:
        """The barrier: what has arrived is counted in, and the fits before are over."""
        for slot in self._slots:
            slot.await_data()

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
