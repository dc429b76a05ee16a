"""What the sites of one fitter hand over in a step, by whose data travels together."""

import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cola.adaptation_data import Parcel
from cola.errors import ColaError, OffloadError
from cola.offload.deliveries import (
    Call,
    Factors,
    Former,
    Gradient,
    send_factors,
    send_gradient,
)
from cola.offload.fit import Fitter
from cola.offload.transfer import Transfer
from cola.sites import SiteName

PREPARED_BYTES = 4 << 20
"""Hidden inputs from this size on are worth a task of their own before their gradients come; those
of the first block always are, whose fit the next forward pass waits for."""

Inputs = list[tuple[SiteName, Parcel]]
"""Hidden inputs of sites, on their way."""


@dataclass
class Sent:
    """What was sent and has not been handed to the worker."""

    sites: list[SiteName] = field(default_factory=list)
    factors: list[Factors] = field(default_factory=list)
    gradients: list[Gradient] = field(default_factory=list)

    def count_in(self, fitter: Fitter) -> None:
        """Waits for all of it and adds it, where it goes; what has been added is let go."""
        with named_failures(self.sites):
            fitter.accumulate([one.receive() for one in self.factors])
            for gradient in self.gradients:
                gradient.receive()
        self.factors.clear()
        self.gradients.clear()


@dataclass
class _Block:
    """Sites that travel together, and what of them waits for the others."""

    open: set[SiteName]
    num_sites: int
    num_prepared: int
    calls: list[tuple[Call, Former | None]] = field(default_factory=list)
    inputs: Inputs = field(default_factory=list)


class Outbox:
    """Sends what its sites hand over, block by block."""

    def __init__(
        self,
        blocks: Sequence[Sequence[SiteName]],
        transfer: Transfer,
        prepared: Collection[SiteName] = (),
        *,
        is_first: bool = False,
    ) -> None:
        """Nothing is sent yet.

        Args:
            blocks: sites, by whose data travels together.
            transfer: to where they are fitted.
            prepared: sites of which something can be done there before gradients come.
            is_first: whether the forward pass begins with these sites.
        """
        self._transfer = transfer
        # A GPU has no idle cores, and where nothing crosses, inputs come with their gradients.
        on_host = transfer.crosses and not transfer.ends_on_gpu
        self._prepared = frozenset(prepared if on_host else ())
        self._prepared_bytes = 0 if is_first else PREPARED_BYTES
        self._blocks = [
            _Block(set(sites), len(sites), len(self._prepared.intersection(sites)))
            for sites in blocks
        ]
        self._block_of = {
            site: block for sites, block in zip(blocks, self._blocks, strict=True) for site in sites
        }
        self._sent = Sent()

    @property
    def is_complete(self) -> bool:
        """Whether every site has closed in this step."""
        return not any(block.open for block in self._blocks)

    def begin_step(self) -> None:
        """All sites are open again; what has been sent has been taken."""
        for site, block in self._block_of.items():
            block.open.add(site)
            block.inputs.clear()

    def add_input(self, site: SiteName, hidden_input: Parcel, num_bytes: int) -> Inputs:
        """Notes a hidden input that has left in the forward pass, when a host's workers idle.

        Returns:
            Those to prepare of its block, once all are there: sites that share one read it once.
        """
        if site not in self._prepared or num_bytes < self._prepared_bytes:
            return []
        block = self._block_of[site]
        block.inputs.append((site, hidden_input))
        if len(block.inputs) < block.num_prepared:
            return []
        inputs, block.inputs = block.inputs, []
        return inputs

    def add(self, call: Call, former: Former | None) -> bool:
        """Takes one call of a site; sends its block's, and says so, if there are enough."""
        block = self._block_of[call.spec.name]
        block.calls.append((call, former))
        return len(block.calls) >= block.num_sites and self._send(block)

    def close(self, site: SiteName) -> bool:
        """The site's data of this step is complete; sends its block's, if that is, and says so."""
        block = self._block_of[site]
        block.open.discard(site)
        return not block.open and self._send(block)

    def flush(self) -> None:
        """Sends everything, complete or not."""
        for block in self._blocks:
            self._send(block)

    def take(self) -> Sent:
        """What has been sent since the last time."""
        sent, self._sent = self._sent, Sent()
        return sent

    def _send(self, block: _Block) -> bool:
        """Sends what a block has collected; whether that is anything."""
        calls, block.calls = block.calls, []
        sites = [call.spec.name for call, _ in calls]
        with named_failures(sites):
            plain = [call for call, former in calls if former is None]
            self._sent.factors += send_factors(plain, self._transfer)
            self._sent.gradients += [
                send_gradient(call, former, self._transfer)
                for call, former in calls
                if former is not None
            ]
        self._sent.sites += sites
        return bool(calls)


@contextmanager
def named_failures(sites: Iterable[SiteName]) -> Iterator[None]:
    """Turns a crash inside a task into an error that names the site and keeps the traceback."""
    try:
        yield
    except ColaError:
        raise
    except Exception as error:
        names = ", ".join(repr(site) for site in sites)
        raise OffloadError(f"fitting site {names} failed:\n{traceback.format_exc()}") from error
