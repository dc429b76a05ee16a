"""How far ahead of the forward pass parameters are fetched, and in how many parts."""

from collections.abc import Callable

import pytest

from cola.lookahead import FIRST_BYTES, MOST_BYTES, Lookahead

NUM_SITES = 224
SITES = [f"site {index}" for index in range(NUM_SITES)]
SITE_BYTES = 58 << 20  # of the layers of a model with 6.5 billion parameters in bfloat16


class Pass:
    """Forward passes over all sites; remembers what was fetched together."""

    def __init__(
        self, site_bytes: int, is_ready: Callable[[str], bool] = lambda site: True
    ) -> None:
        self._lookahead = Lookahead(SITES)
        self._site_bytes, self._is_ready = site_bytes, is_ready
        self.there: set[str] = set()
        self.parts: list[list[str]] = []
        self.most_ahead = 0

    def run(self) -> None:
        self.there, self.parts = set(), []
        self._lookahead.begin()
        for index, site in enumerate(SITES):
            if site not in self.there:
                self._fetch([site], ahead=False)
            self._lookahead.passed(site)
            found = self._lookahead.due(self.there.__contains__, self._is_ready)
            if found:
                self._fetch(found, ahead=True)
            ahead = sum(other in self.there for other in SITES[index + 1 :])
            self.most_ahead = max(self.most_ahead, ahead * self._site_bytes)

    def _fetch(self, sites: list[str], *, ahead: bool) -> None:
        self.parts.append(sites)
        self.there.update(sites)
        self._lookahead.fetched(dict.fromkeys(sites, self._site_bytes), ahead=ahead)


def test_large_weights_come_in_parts_that_double() -> None:
    passing = Pass(SITE_BYTES)
    for _ in range(2):  # sizes are not known in the first
        passing.run()
    assert [site for part in passing.parts for site in part] == SITES
    first, second = passing.parts[:2]
    assert first == SITES[:1], "it is waited for"
    assert len(second) * SITE_BYTES <= FIRST_BYTES + SITE_BYTES
    assert len(passing.parts) <= 8 + NUM_SITES * SITE_BYTES // (MOST_BYTES // 2)


def test_no_more_is_ahead_than_allowed() -> None:
    passing = Pass(SITE_BYTES)
    for _ in range(2):
        passing.run()
        passing.most_ahead = 0  # of the first pass nothing is known
    passing.run()
    assert MOST_BYTES <= passing.most_ahead < MOST_BYTES + SITE_BYTES


def test_small_parameters_come_all_at_once() -> None:
    passing = Pass(1 << 10)
    passing.run()
    assert passing.parts == [SITES[:1], SITES[1:]]


def test_sites_behind_one_that_is_not_ready_wait() -> None:
    unfinished = {SITES[5]}
    passing = Pass(SITE_BYTES, lambda site: site not in unfinished)
    passing.run()
    assert SITES[4] not in passing.parts[-1]
    where = next(index for index, part in enumerate(passing.parts) if SITES[5] in part)
    assert passing.parts[where] == [SITES[5]], "its own run waits for it"
    assert all(SITES[6] not in part for part in passing.parts[:where])


def test_what_is_there_is_not_fetched_again() -> None:
    lookahead = Lookahead(SITES)
    assert lookahead.due(lambda site: site in SITES[:220], lambda site: True) == SITES[220:]


@pytest.mark.parametrize("ahead", [True, False])
def test_only_what_is_ahead_holds_more_up(ahead: bool) -> None:
    lookahead = Lookahead(SITES)
    lookahead.fetched({"site 0": MOST_BYTES}, ahead=ahead)
    due = lookahead.due(lambda site: site == "site 0", lambda site: True)
    assert bool(due) is not ahead
    lookahead.passed("site 0")
    assert lookahead.due(lambda site: site in due, lambda site: True) or not ahead
