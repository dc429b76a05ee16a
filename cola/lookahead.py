"""Which sites to come have their parameters fetched next, and how many of them at a time."""

from collections.abc import Callable, Iterable, Mapping

from cola.sites import SiteName

FIRST_BYTES = 64 << 20
"""Fetched first: the sites that run next should not wait for many others to arrive."""

MOST_BYTES = 512 << 20
"""That are on their way, or have not been used, at a time: in large parts, since every part takes
the host a dozen calls, whatever its size."""


class Lookahead:
    """Walks through the sites in front of the forward pass, in parts that double."""

    def __init__(self, sites: Iterable[SiteName]) -> None:
        """`sites` in about the order of the forward pass."""
        self._order = list(sites)
        self._num_bytes: dict[SiteName, int] = {}  # of what came last
        self.begin()

    def begin(self) -> None:
        """A new forward pass; what came earlier holds nothing up."""
        self._num_seen = 0  # of `_order`: they are there, or on their way
        self._coming: dict[SiteName, int] = {}  # bytes of what is fetched before its site runs
        self._num_coming = 0  # bytes of all of them
        self._limit = FIRST_BYTES

    def passed(self, site: SiteName) -> None:
        """A site runs: what was fetched for it is no longer ahead."""
        self._num_coming -= self._coming.pop(site, 0)

    def due(
        self, is_there: Callable[[SiteName], bool], is_ready: Callable[[SiteName], bool]
    ) -> list[SiteName]:
        """Sites to fetch together now; none while at least half of the limit is ahead.

        Args:
            is_there: whether a site has its parameters.
            is_ready: whether it can have them at once; sites behind one that cannot wait for it.
        """
        found: list[SiteName] = []
        num_bytes = self._num_coming
        if num_bytes > self._limit // 2:
            return found
        while self._num_seen < len(self._order) and num_bytes < self._limit:
            site = self._order[self._num_seen]
            if not is_there(site):
                if not is_ready(site):
                    break
                found.append(site)
                num_bytes += self._num_bytes.get(site, 0)
            self._num_seen += 1
        return found

    def fetched(self, num_bytes: Mapping[SiteName, int], *, ahead: bool) -> None:
        """Parameters of so many bytes are on their way, by site; ahead: before their sites run."""
        self._num_bytes.update(num_bytes)
        if not ahead:
            return
        self._coming.update(num_bytes)
        self._num_coming = sum(self._coming.values())
        self._limit = min(2 * self._limit, MOST_BYTES)
