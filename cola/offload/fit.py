"""What a fit is, and what is asked of those who fit. Algorithm 1, lines 11 to 16."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.sites import SiteName
from cola.user_adapters import SiteAdapter


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One step of an adapter.

    Attributes:
        number: adaptation, 1 for the first.
        learning_rate: gamma_t.
        gradient_scale: factor on the accumulated gradient (interval reduction).
        user_scales: (K,) the same for each user, where users' rows are averaged apart.
    """

    number: int
    learning_rate: float
    gradient_scale: float
    user_scales: tuple[float, ...] | None = None


class Fitter(Protocol):
    """What a fleet asks of those who own adapters and step them together."""

    @property
    def adapters(self) -> "Mapping[SiteName, SiteAdapter]":
        """By site."""

    @property
    def device(self) -> torch.device:
        """Where they are fitted."""

    @property
    def held_bytes(self) -> Mapping[str, int]:
        """By owner, as of the last step."""

    def can_prepare(self, site: SiteName) -> bool:
        """Whether a part of a site's fit needs no hidden gradient."""

    def prepare(self, inputs: Sequence[tuple[SiteName, Tensor]]) -> None:
        """Does that part for such sites, whose data will be accumulated next."""

    def accumulate(self, batch: Sequence[tuple[SiteName, AdaptationData]]) -> None:
        """Adds the gradients of one batch, call by call of its sites."""

    def gradient_norm(self, site: SiteName, fit: Fit) -> Tensor:
        """Of the interval's gradient, a scalar, or (K,) with users."""

    def step(self, fit: Fit, clip_factor: float | Tensor = 1.0) -> list[SiteName]:
        """Optimises what has data; returns the sites that stepped."""

    def check_finite(self, number: int) -> None:
        """Looks for what a GPU could not be asked at every step."""

    def state_dict(self, site: SiteName) -> dict[str, Any]:
        """Of one site."""

    def load_state_dict(self, states: Mapping[SiteName, Mapping[str, Any]]) -> None:
        """Continues from the states of all sites."""
