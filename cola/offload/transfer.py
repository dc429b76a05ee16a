"""Moves adaptation data from the base device to an offload device, and parameters back.

Algorithm 1, lines 9 and 15. Off a GPU the copies run on a side stream, into pinned memory of the
host or onto another GPU, and the worker waits for them, not the base device: a blocking copy in a
hook would stall forward and backward at every site.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cola.adaptation_data import Parcel
from cola.kept_rows import KeptRows
from cola.offload.departures import Departures
from cola.offload.staging import Staging
from cola.packing import packed_memory, unpack
from cola.site_calls import SiteRun
from cola.sites import SiteSpec, flatten_rows


class StagedBytes:
    """Adaptation data that has left the base model and has not been fitted yet."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # one may be forgotten while another is counted in
        self.now = self.peak = self.total = 0

    def add(self, num: int) -> None:
        """Counts what was sent, or, negative, what was forgotten."""
        with self._lock:
            self.now += num
            self.total += max(num, 0)
            self.peak = max(self.peak, self.now)


class Shipment:
    """One tensor on its way, counted as staged until nobody needs it any more."""

    def __init__(self, tensor: Tensor, wait: Callable[[Tensor], None], staged: StagedBytes) -> None:
        self._tensor, self._wait, self._staged = tensor, wait, staged
        staged.add(tensor.nbytes)

    def __call__(self) -> Tensor:
        """Waits for it, where it goes."""
        self._wait(self._tensor)
        return self._tensor

    def __del__(self) -> None:
        self._staged.add(-self._tensor.nbytes)


@dataclass(frozen=True)
class Cargo:
    """A tensor that is to leave, and what of it.

    Attributes:
        sources: the tensors that `load` reads.
        load: makes what travels.
    """

    sources: Sequence[Tensor]
    load: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class _Sent:
    """A hidden input that is on its way, and may be the input of other sites, too."""

    source: "weakref.ref[Tensor]"
    version: int
    parcel: Parcel


_Key = tuple[int, torch.dtype, int]


def _key(run: SiteRun) -> _Key:
    """What of a hidden input is sent; an object may have had its number before."""
    return id(run.hidden_input), run.dtype, id(run.kept)


class Transfer:
    """Sends adaptation data of one base device to one offload device.

    Attributes:
        target: the offload device.
        crosses: whether anything has to be copied at all.
        staged: what was sent.
    """

    def __init__(
        self, source: torch.device, target: torch.device, *, wire_dtype: torch.dtype | None = None
    ) -> None:
        """`wire_dtype` is what data is rounded to on the wire; None: as the base has it."""
        self.target = target
        self.crosses = source.type == "cuda" and source != target
        self.staged = StagedBytes()
        self._source = source
        self._wire_dtype = wire_dtype
        self._last: dict[_Key, _Sent] = {}
        self._departures = Departures()
        self._staging = Staging()
        self._before: torch.cuda.Event | None = None  # of what was sent last to a host
        if self.crosses:
            self._base = torch.cuda.current_stream(source)
            self._stream = torch.cuda.Stream(source)  # type: ignore[no-untyped-call]
            self._produced = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if self.ends_on_gpu:
            # A copy between GPUs is ordered with the current streams of both. On a default stream
            # it would be a barrier for everything on either GPU, and on one for both ways what
            # comes back would wait for what leaves.
            self._landing = torch.cuda.Stream(target)  # type: ignore[no-untyped-call]
            self._returning = torch.cuda.Stream(target)  # type: ignore[no-untyped-call]

    def send_distinct(self, runs: Sequence[tuple[SiteSpec, SiteRun]]) -> list[Parcel]:
        """Sends hidden inputs; query and value have the same one, which is sent once."""
        self._last = {key: sent for key, sent in self._last.items() if sent.source() is not None}
        fresh = {_key(run): (spec, run) for spec, run in runs if self._find(run) is None}
        parcels = self.ship(
            [
                self.rows_of(run.hidden_input.detach(), spec, run.dtype, run.kept)
                for spec, run in fresh.values()
            ]
        )
        for (_, run), parcel in zip(fresh.values(), parcels, strict=True):
            source = weakref.ref(run.hidden_input)
            self._last[_key(run)] = _Sent(source, run.hidden_input._version, parcel)
        return [self._last[_key(run)].parcel for _, run in runs]

    def _find(self, run: SiteRun) -> Parcel | None:
        """The same, if it was sent before and has not been changed since."""
        found = self._last.get(_key(run))
        is_same = found is not None and found.version == run.hidden_input._version
        return found.parcel if found is not None and is_same else None

    def rows_of(
        self, tensor: Tensor, spec: SiteSpec, dtype: torch.dtype, kept: KeptRows | None
    ) -> Cargo:
        """Rows (N, D) of a tensor (..., D)."""
        return Cargo(
            sources=[tensor] if kept is None else [tensor, kept.index],
            load=lambda: pick_rows(tensor, spec, dtype, kept),
        )

    def as_it_is(self, tensor: Tensor) -> Cargo:
        """All of a tensor, of any shape."""
        return Cargo(sources=[tensor], load=lambda: tensor)

    def ship(self, cargo: Sequence[Cargo]) -> list[Parcel]:
        """Starts to copy tensors, together, and returns at once."""
        if not cargo:
            return []
        if not self.crosses:
            return [Shipment(self._load(one), _is_here, self.staged) for one in cargo]
        # They were produced on the base stream: read them only after this point.
        self._produced.record(self._base)
        self._stream.wait_event(self._produced)
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        # Set by hand: `torch.cuda.stream` costs several times as much, at every site.
        if self.ends_on_gpu:
            torch.cuda.set_stream(self._landing)
        torch.cuda.set_stream(self._stream)
        try:
            landed = self._land([self._load(one) for one in cargo])
            arrived.record(self._stream)
        finally:
            torch.cuda.set_stream(self._base)
        sources = [source for one in cargo for source in one.sources]
        self._departures.add(sources, arrived, self._base)
        wait = self._waiting(arrived)
        return [Shipment(tensor, wait, self.staged) for tensor in landed]

    def issued(self) -> torch.cuda.Event | None:
        """Passed when all is done that this thread has issued where data goes; None: it is."""
        if not self.ends_on_gpu:
            return None
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.target))
        return event

    def follow(self, event: torch.cuda.Event | None) -> None:
        """Nothing that this thread issues from here on, at either end, overtakes an event.

        What it fetches from there comes on a stream of its own.
        """
        if not self.ends_on_gpu:
            return
        here = torch.cuda.current_stream(self._source)
        if event is not None:
            here.wait_event(event)
            self._returning.wait_event(event)
        torch.cuda.set_stream(self._returning)
        torch.cuda.set_stream(here)  # and with it the device

    def settle(self) -> None:
        """Waits, where data goes, for all that has been issued there."""
        if self.ends_on_gpu:
            torch.cuda.synchronize(self.target)

    @property
    def held_bytes(self) -> int:
        """The most that was staged, or memory of the host that is pinned for it."""
        return max(self.staged.peak, self._staging.num_bytes)

    @property
    def ends_on_gpu(self) -> bool:
        """Whether data goes to a GPU other than the base device, where work has its own order."""
        return self.crosses and self.target.type == "cuda"

    def forget(self) -> None:
        """Hidden inputs that were sent are of no use to sites to come."""
        self._last.clear()
        if self._departures.num_bytes:
            self._departures.let_go(self._base)

    def begin_step(self) -> None:
        """Learns which stream the base model runs on."""
        self.forget()
        if self.crosses:
            self._base = torch.cuda.current_stream(self._source)

    def _load(self, cargo: Cargo) -> Tensor:
        tensor = cargo.load()
        return tensor if self._wire_dtype is None else tensor.to(self._wire_dtype)

    def _land(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        def land(tensor: Tensor) -> Tensor:
            if self.ends_on_gpu:
                landed = torch.empty_like(tensor, device=self.target)
            else:
                landed = self._staging.take(tensor)
            return landed.copy_(tensor, non_blocking=True)

        memory = packed_memory(tensors)
        return [land(x) for x in tensors] if memory is None else unpack(land(memory), tensors)

    def _waiting(self, arrived: torch.cuda.Event) -> Callable[[Tensor], None]:
        if self.target.type == "cpu":
            return self._waiting_on_host(arrived)

        def wait(tensor: Tensor) -> None:
            stream = torch.cuda.current_stream(self.target)  # the worker's own
            stream.wait_event(arrived)
            tensor.record_stream(stream)

        return wait

    def _waiting_on_host(self, arrived: torch.cuda.Event) -> Callable[[Tensor], None]:
        """Sleeps until what was sent before has arrived, then looks all the time.

        A host that sleeps is told 0.2 ms late, which the next forward pass waits for, too; workers
        that look from the start would take all cores.
        """
        landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        landed.record(self._stream)
        before, self._before = self._before, arrived

        def wait(tensor: Tensor) -> None:
            if before is not None:
                before.synchronize()
            landed.synchronize()

        return wait


def stay(runs: Sequence[tuple[SiteSpec, SiteRun]]) -> list[Parcel]:
    """What is fitted of hidden inputs that are needed where they are."""
    return [
        partial(_itself, pick_rows(run.hidden_input, spec, run.dtype, run.kept))
        for spec, run in runs
    ]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def pick_rows(tensor: Tensor, spec: SiteSpec, dtype: torch.dtype, kept: KeptRows | None) -> Tensor:
    """What is fitted of (..., D): rows (N, D), still where it is."""
    rows = flatten_rows(tensor, spec) if kept is None else kept.take(tensor)
    return rows.to(dtype)


def _is_here(tensor: Tensor) -> None:
    """Nothing to wait for."""
