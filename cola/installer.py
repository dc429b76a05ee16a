"""Brings parameters of the last adaptation to the sites. Algorithm 1, line 15.

The base model waits for a site's parameters only on reaching it. On a GPU they come on a stream of
their own, and those of the next sites are fetched ahead while the present one computes, so that the
way back is hidden, too. The host waits for a fit that has not ended; the device waits for a copy.

Where it is known that the backward pass is done with a site (`release`), its next parameters need
not wait for the next forward pass.
"""

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cola.interfaces import ParameterSource, Placement
from cola.lookahead import Lookahead
from cola.sites import SiteName


class Installer:
    """Knows which version every site has, and brings the next.

    Attributes:
        placement: where adapters act; may be exchanged while nothing runs.
        stall_seconds: time the host waited for parameters so far.
        installed_bytes: parameters that came back so far.
    """

    def __init__(
        self,
        sites: Iterable[SiteName],
        placement: Placement,
        source: ParameterSource,
        device: torch.device,
    ) -> None:
        """`sites` in about the order of the forward pass; `device` is the base model's."""
        self.placement = placement
        self.stall_seconds = 0.0
        self.installed_bytes = 0
        self._source = source
        self._device = device
        self._order = list(sites)
        self._installed: dict[SiteName, int] = {}
        self._version = 0
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._base = torch.cuda.current_stream(device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lookahead = Lookahead(self._order)
        self._arrivals: dict[SiteName, torch.cuda.Event] = {}  # of sites that have not run since
        self._last_arrival: torch.cuda.Event | None = None
        self._following: int | None = None
        self._released: list[SiteName] = []  # not installed yet

    def begin(self, version: int, following: int | None = None) -> None:
        """A new forward pass; everything that used older parameters has been issued.

        Args:
            version: to install.
            following: the version of the next pass, if this one's data is all that it waits for.
        """
        self._version, self._following = version, following
        self._released = []
        self._lookahead.begin()
        if self._stream is not None:
            self._base = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(self._base)

    def require(self, sites: Sequence[SiteName]) -> None:
        """These sites run next: their parameters are in effect when this returns."""
        missing = [site for site in sites if self._installed.get(site) != self._version]
        if missing:
            self._fetch(missing, self._version)
        if self._stream is None:
            return
        for site in sites:
            self._lookahead.passed(site)
            arrival = self._arrivals.pop(site, None)
            if arrival is not None and arrival is not self._last_arrival:
                self._base.wait_event(arrival)
                self._last_arrival = arrival  # of all sites that came together

    def fetch_ahead(self) -> None:
        """Fetches the next sites that are ready, unless enough are on their way.

        For when the sites that were required have been issued: what comes takes the host a while.
        """
        if self._stream is None:
            return
        version = self._version
        coming = self._lookahead.due(
            lambda site: self._installed.get(site) == version,
            lambda site: bool(self._source.ready([site], version)),
        )
        if coming:
            self._fetch(coming, version, ahead=True)

    def release(self, sites: Iterable[SiteName]) -> None:
        """The backward pass has left these sites, or has left one of their runs.

        A fit that ended has met the gradients of all of them.
        """
        version = self._following
        if version is None:
            return
        self._released.extend(sites)
        ready = self._source.ready(self._released, version)
        if ready:
            if self._stream is not None:
                self._stream.wait_stream(self._base)
            self._fetch(ready, version)
            fetched = set(ready)
            self._released = [site for site in self._released if site not in fetched]

    def install_all(self, version: int) -> None:
        """Brings every site to one version; the source must have drained."""
        self.begin(version)
        for site in self._order:
            self.require([site])
            self.fetch_ahead()

    def forget(self) -> None:
        """Makes the next forward pass fetch everything afresh.

        What is still coming, for a site that did not run, has come before the base device goes on.
        """
        if self._stream is not None:
            self._base.wait_stream(self._stream)
        self._installed.clear()
        self._arrivals.clear()
        self._lookahead.begin()

    def _fetch(self, sites: Sequence[SiteName], version: int, *, ahead: bool = False) -> None:
        if self._stream is None:
            published = self._install(sites, version)
        else:
            # Set by hand: `torch.cuda.stream` costs several times as much.
            torch.cuda.set_stream(self._stream)
            try:
                published = self._install(sites, version)
            finally:
                torch.cuda.set_stream(self._base)
            arrival = self._stream.record_event()
            self._arrivals.update(dict.fromkeys(sites, arrival))
        num_bytes = {s: sum(t.nbytes for t in own.values()) for s, own in published.items()}
        self._lookahead.fetched(num_bytes, ahead=ahead)
        self.installed_bytes += sum(num_bytes.values())
        self._installed.update(dict.fromkeys(sites, version))

    def _install(
        self, sites: Sequence[SiteName], version: int
    ) -> dict[SiteName, Mapping[str, Tensor]]:
        """Waits for fits; what they publish is written on the present stream."""
        start = time.perf_counter()
        published = self._source.wait(sites, version)
        self.stall_seconds += time.perf_counter() - start
        self.placement.install_all(published)
        return published
