"""What a site hands over in one step, from the base device to its worker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from cola.adaptation_data import AdaptationData, Parcel
from cola.kept_rows import KeptRows
from cola.offload.transfer import Transfer, pick_rows
from cola.sites import SiteName, SiteSpec
from cola.user_rows import UserRows


class Former(NamedTuple):
    """Forms the gradient of a site's adapter on the base device, and adds it where it is fitted."""

    form: Callable[[AdaptationData], Mapping[str, Tensor]]
    add: Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One gradient-carrying call of a site, its gradient still on the base device.

    Attributes:
        spec: of the site.
        hidden_input: on its way, or still here too.
        hidden_gradient: (..., H).
        kept: rows that travel; None: all.
        rows: whose those are, where users have adapters of their own.
    """

    spec: SiteSpec
    hidden_input: Parcel
    hidden_gradient: Tensor
    kept: KeptRows | None
    rows: UserRows | None

    def receive(self) -> tuple[SiteName, AdaptationData]:
        """Both factors, where they are."""
        dtype = self.hidden_gradient.dtype
        return self.spec.name, AdaptationData(
            hidden_input=self.hidden_input(),
            hidden_gradient=pick_rows(self.hidden_gradient, self.spec, dtype, self.kept),
            rows=self.rows,
        )


class Factors(NamedTuple):
    """Both factors of a gradient, on their way."""

    site: SiteName
    hidden_input: Parcel
    hidden_gradient: Parcel
    rows: UserRows | None

    def receive(self) -> tuple[SiteName, AdaptationData]:
        """Waits for both; runs where they are going."""
        return self.site, AdaptationData(
            hidden_input=self.hidden_input(),
            hidden_gradient=self.hidden_gradient(),
            rows=self.rows,
        )


class Gradient(NamedTuple):
    """A gradient that was formed on the base device, on its way."""

    parts: Mapping[str, Parcel]
    add: Callable[[Mapping[str, Tensor]], None]

    def receive(self) -> None:
        """Waits for all of it and adds it; runs where it is going."""
        self.add({name: part() for name, part in self.parts.items()})


def send_factors(calls: list[Call], transfer: Transfer) -> list[Factors]:
    """Sends the hidden gradients of several calls together."""
    if not calls:
        return []
    cargo = [
        transfer.rows_of(call.hidden_gradient, call.spec, call.hidden_gradient.dtype, call.kept)
        for call in calls
    ]
    return [
        Factors(call.spec.name, call.hidden_input, sent, call.rows)
        for call, sent in zip(calls, transfer.ship(cargo), strict=True)
    ]


def send_gradient(call: Call, former: Former, transfer: Transfer) -> Gradient:
    """Forms what both factors make of the adapter's gradient, and sends that."""
    _, data = call.receive()
    gradients = former.form(data)
    cargo = [transfer.as_it_is(part) for part in gradients.values()]
    return Gradient(dict(zip(gradients, transfer.ship(cargo), strict=True)), former.add)
