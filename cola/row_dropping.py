"""Leaves rows of padding on the base device, once the base model has shown that it may.

That their hidden gradients are zero holds for attention under a mask, not for whatever mixes
tokens in another way (a mean over all of them, a state-space model). So the first batch with
padding travels whole, and its gradients are looked at, site by site.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cola.kept_rows import KeptRows, keep_rows
from cola.sites import RowStream, SiteName, SiteSpec
from cola.task_data import Batch

logger = logging.getLogger(__name__)


class _Finding(NamedTuple):
    """What one call of a site showed."""

    site: SiteName
    has_zeros: bool  # its hidden gradient is exactly zero at padding
    is_taught: bool  # and is not zero everywhere


class RowDropping:
    """Decides at which sites rows of padding stay behind, and says which rows those are."""

    def __init__(
        self, sites: Mapping[SiteName, SiteSpec], device: torch.device, *, enabled: bool
    ) -> None:
        """Starts undecided.

        Args:
            sites: of the base model.
            device: of the base model.
            enabled: offload.drop_padding.
        """
        self._streams = {
            name: spec.stream
            for name, spec in sites.items()
            if enabled and spec.stream is not RowStream.whole
        }
        self._device = device
        self._dropping: dict[RowStream, list[SiteName]] = {}  # of streams that are decided
        self._checked: dict[RowStream, KeptRows] = {}  # of this step
        self._misfits: set[SiteName] = set()
        self._facts: list[tuple[SiteName, Tensor]] = []  # (2,) bool each, of one call

    def begin(self, batch: Batch) -> dict[SiteName, KeptRows]:
        """Starts a recorded step; sites that are not named here send all rows.

        A named site still has to ask `KeptRows.applies_to` at every call.
        """
        kept = self._kept(batch)
        self._checked = {
            stream: rows for stream, rows in kept.items() if stream not in self._dropping
        }
        self._misfits, self._facts = set(), []
        return {
            site: rows for stream, rows in kept.items() for site in self._dropping.get(stream, [])
        }

    def check(self, site: SiteName, shape: torch.Size, hidden_gradient: Tensor) -> None:
        """Looks at one call of a site in a step that decides; does not wait for the device.

        Args:
            site: whose gradient has arrived.
            shape: of the hidden input, as the site got it.
            hidden_gradient: (B, T, H) or (B*T, H).
        """
        kept = self._checked.get(self._streams.get(site, RowStream.whole))
        if kept is None:
            return
        if not kept.applies_to(shape):
            # In a later batch its rows might be as many by chance.
            self._misfits.add(site)
            return
        facts = torch.stack([kept.is_zero_elsewhere(hidden_gradient), hidden_gradient.any()])
        self._facts.append((site, facts))

    def settle(self) -> None:
        """Decides after the backward pass; waits for the device in a step that decides."""
        if not self._checked:
            return
        findings = self._read()
        for stream in self._checked:
            own = [finding for finding in findings if self._streams[finding.site] is stream]
            # Without any gradient, zeros prove nothing: the next batch is looked at.
            if not own or any(finding.is_taught for finding in own):
                self._dropping[stream] = self._decide(own)
        self._checked = {}

    def state_dict(self) -> dict[str, Any]:
        """What is decided: a resumed run drops the same rows, to the bit."""
        return {stream.value: sites for stream, sites in self._dropping.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._dropping = {RowStream(stream): list(sites) for stream, sites in state.items()}

    def _kept(self, batch: Batch) -> dict[RowStream, KeptRows]:
        """Rows to keep of each text that has padding and sites."""
        wanted = set(self._streams.values())
        found = {
            stream: keep_rows(mask, batch.rows, self._device)
            for stream, mask in batch.row_masks.items()
            if stream in wanted and self._dropping.get(stream) != []
        }
        return {stream: kept for stream, kept in found.items() if kept is not None}

    def _read(self) -> list[_Finding]:
        if not self._facts:
            return []
        answers = torch.stack([facts for _, facts in self._facts]).tolist()  # the GPU waits here
        sites = [site for site, _ in self._facts]
        return [_Finding(site, *answer) for site, answer in zip(sites, answers, strict=True)]

    def _decide(self, findings: Sequence[_Finding]) -> list[SiteName]:
        """Sites of one text whose rows of padding stay behind."""
        mixed = dict.fromkeys(finding.site for finding in findings if not finding.has_zeros)
        if mixed:
            logger.warning(
                "the base model has gradients at tokens of padding (site %r, %d of %d): all rows "
                "travel; offload.drop_padding=false says so from the start",
                next(iter(mixed)),
                len(mixed),
                len({finding.site for finding in findings}),
            )
            return []
        sites = dict.fromkeys(finding.site for finding in findings)
        return [site for site in sites if site not in self._misfits]
