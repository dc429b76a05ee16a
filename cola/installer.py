"""Brings parameters of the last adaptation to the sites. Algorithm 1, line 15.

The base model waits for a site's parameters only on reaching it. On a GPU they come on a stream of
their own, and those of the next sites are fetched ahead while the present one computes, so that the
way back is hidden, too. The host waits for a fit that has not ended; the device waits for a copy.
"""

import time
from collections.abc import Iterable

import torch

from cola.interfaces import ParameterSource, Placement
from cola.sites import SiteName

FETCHED_AHEAD = 8
"""Sites after the present one whose parameters are fetched as soon as they are there."""


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
        self._index = {site: index for index, site in enumerate(self._order)}
        self._installed: dict[SiteName, int] = {}
        self._version = 0
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._base = torch.cuda.current_stream(device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ahead = 0  # sites of `_order` that have this version, or are on their way
        self._arrivals: dict[SiteName, torch.cuda.Event] = {}

    def begin(self, version: int) -> None:
        """A new forward pass; everything that used older parameters has been issued."""
        self._version = version
        self._ahead = 0
        if self._stream is not None:
            self._base = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(self._base)

    def require(self, site: SiteName) -> None:
        """The site runs next: its parameters are in effect when this returns."""
        if self._installed.get(site) != self._version:
            self._fetch(site)
        arrival = self._arrivals.pop(site, None)
        if arrival is not None:
            self._base.wait_event(arrival)
        if self._stream is not None:
            self._fetch_ahead(site)

    def install_all(self, version: int) -> None:
        """Brings every site to one version; the source must have drained."""
        self.begin(version)
        for site in self._order:
            self.require(site)

    def forget(self) -> None:
        """Makes the next forward pass fetch everything afresh."""
        self._installed.clear()
        self._arrivals.clear()

    def _fetch_ahead(self, site: SiteName) -> None:
        last = min(self._index[site] + 1 + FETCHED_AHEAD, len(self._order))
        while self._ahead < last:
            following = self._order[self._ahead]
            if self._installed.get(following) != self._version:
                if not self._source.is_ready(following, self._version):
                    return
                self._fetch(following)
            self._ahead += 1

    def _fetch(self, site: SiteName) -> None:
        start = time.perf_counter()
        published = self._source.wait(site, self._version)
        self.stall_seconds += time.perf_counter() - start
        if self._stream is None:
            self.placement.install(site, published)
        else:
            # Set by hand: `torch.cuda.stream` costs several times as much, at every site.
            torch.cuda.set_stream(self._stream)
            try:
                self.placement.install(site, published)
            finally:
                torch.cuda.set_stream(self._base)
            self._arrivals[site] = self._stream.record_event()
        self.installed_bytes += sum(tensor.nbytes for tensor in published.values())
        self._installed[site] = self._version
