"""What rounding swallows of updates that are merged into weights of low precision."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from cola.rounded_sums import Update, sum_dtype
from cola.sites import SiteName

NUM_SAMPLED = 1 << 16
"""Entries of a weight that are looked at, in whole rows (at least one)."""


Moved = Callable[[], Tensor]
"""Which entries of the sampled rows an update moves."""


class RoundingLoss:
    """Remembers which sampled entries an update moves, until somebody asks what became of them."""

    def __init__(self) -> None:
        self._published: dict[SiteName, Moved] = {}  # sampled rows of delta W != 0
        self._in_use: dict[SiteName, Moved] = {}

    def publish(self, site: SiteName, weight: Tensor, update: Update) -> None:
        """An update is on its way; nothing is kept if its sum with the weight is not rounded."""
        if sum_dtype(weight, update) is not weight.dtype:
            moved = update.rows(sampled_rows(weight)) != 0  # now: factors are stepped in place
            self._published[site] = lambda: moved

    def publish_stacked(
        self, sites: Iterable[SiteName], weight: Tensor, left: Tensor, right: Tensor
    ) -> None:
        """The same of P weights like this one; factors, (P, ...), that nobody changes."""
        rows = sampled_rows(weight)
        for index, site in enumerate(sites):
            self._published[site] = partial(_moved, left, right, index, rows)

    def install(self, site: SiteName) -> None:
        """What was published last is in the weight now."""
        if site in self._published:
            self._in_use[site] = self._published[site]

    def forget(self) -> None:
        """Nothing is merged any more."""
        self._in_use.clear()

    @property
    def sites(self) -> list[SiteName]:
        """Those with a merged update that was rounded."""
        return list(self._in_use)

    @torch.no_grad()
    def share(self, site: SiteName, pristine: Tensor, found: Tensor) -> Tensor:
        """Of the sampled entries that the update moves, those that are as they were found."""
        rows, moved = sampled_rows(pristine), self._in_use[site]()
        unchanged = (found[rows].to(pristine.device) == pristine[rows]).flatten(1)
        moved = moved.to(unchanged.device)
        return (unchanged & moved).sum() / moved.sum().clamp(min=1)


def _moved(left: Tensor, right: Tensor, index: int, rows: slice) -> Tensor:
    return left[index, rows] @ right[index] != 0


def sampled_rows(weight: Tensor) -> slice:
    """About as many rows as `NUM_SAMPLED` entries are, spread evenly."""
    num_rows = max(1, NUM_SAMPLED // weight[:1].numel())
    return slice(None, None, -(-len(weight) // num_rows))
