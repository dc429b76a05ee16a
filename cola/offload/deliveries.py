"""What a site hands over in one step, from the base device to its worker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from cola.adaptation_data import AdaptationData, Parcel
from cola.kept_rows import KeptRows
from cola.offload.gradient_norms import norms_of
from cola.offload.transfer import Transfer, pick_rows
from cola.sites import SiteName, SiteSpec
from cola.user_rows import UserRows


class Former(NamedTuple):
    """Forms the gradient of a site's adapter on the base device, and adds it where it is fitted.

    Attributes:
        form: by parameter.
        add: takes that, and the norm of each, (P,), in the same order, if it is known.
    """

    form: Callable[[AdaptationData], Mapping[str, Tensor]]
    add: Callable[[Mapping[str, Tensor], Tensor | None], None]


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
    norms: Parcel | None
    add: Callable[[Mapping[str, Tensor], Tensor | None], None]

    def receive(self) -> None:
        """Waits for all of it and adds it; runs where it is going."""
        norms = None if self.norms is None else self.norms()
        self.add({name: part() for name, part in self.parts.items()}, norms)


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
    """Forms what both factors make of the adapter's gradient, and sends that.

    A host, whose memory binds, need not read it just for its norm.
    """
    _, data = call.receive()
    gradients = former.form(data)
    leaving = list(gradients.values())
    if transfer.crosses and not transfer.ends_on_gpu:
        leaving.append(norms_of(leaving))
    parcels = transfer.ship([transfer.as_it_is(part) for part in leaving])
    norms = parcels.pop() if len(leaving) > len(gradients) else None
    return Gradient(dict(zip(gradients, parcels, strict=True)), norms, former.add)
