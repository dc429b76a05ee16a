"""Users whose gradients were not finite, noted where fits run and told when a host may ask."""

from collections.abc import Sequence

from torch import Tensor

from cola.roster import Roster
from cola.sites import SiteName


class BrokenUsers:
    """Who has to stop, without waiting for a GPU to know."""

    def __init__(self, roster: Roster) -> None:
        """Nobody yet."""
        self._roster = roster
        self._found: dict[tuple[tuple[SiteName, ...], int], Tensor] = {}  # (S, K) bool

    def note(self, sites: Sequence[SiteName], first: int, broken: Tensor | None) -> None:
        """Adds what was found.

        Args:
            sites: S of them.
            first: position of the first user in question.
            broken: (S, K) whose gradient at which site was not finite; None: nobody's.
        """
        if broken is None:
            return
        key = (tuple(sites), first)
        self._found[key] = self._found[key] | broken if key in self._found else broken

    def report(self, number: int) -> None:
        """Tells the roster who was noted up to adaptation `number`; waits for a GPU."""
        for (sites, first), broken in self._found.items():
            for index, user in broken.nonzero().tolist():
                reason = f"the hidden gradient of site {sites[index]!r} is not finite"
                self._roster.stop(first + user, f"{reason} (adaptation {number})")
        self._found = {}
