"""Gradient learning: Algorithm 1 for one batch.

The base model's device runs forward and backward for hidden representations only. Everything an
adapter needs leaves through the taps while the backward pass is still running, and comes back site
by site when the next forward pass reaches the site.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cola.adaptation_data import IntervalWeights
from cola.adapters import Adapter
from cola.config.choices import Objective, Reduction
from cola.interfaces import Adaptation, Batch, Measurements, Placement
from cola.merging import Merger
from cola.meters import BusyTimer, add_held, count_bytes
from cola.objectives import task_loss
from cola.offload.fitter import Fit
from cola.offload.fleet import Fleet
from cola.sites import SiteName
from cola.taps import Taps


class GradientLearner:
    """Trains the fleet's adapters with the base model's hidden gradients."""

    def __init__(
        self,
        base_model: nn.Module,
        *,
        objective: Objective,
        taps: Taps,
        fleet: Fleet,
        placement: Placement,
        evaluation_placement: Placement | None,
        reduction: Reduction,
    ) -> None:
        """`evaluation_placement` is None where evaluation places adapters as training does."""
        self._base_model = base_model
        self._objective = objective
        self._taps = taps
        self._fleet = fleet
        self._placement = placement
        self._evaluation_placement = evaluation_placement
        self._weights = IntervalWeights(reduction)
        self._version = 0
        self._device = next(base_model.parameters()).device
        self._timer = BusyTimer(self._device)
        set_training_mode(base_model)

    @property
    def num_trainable(self) -> int:
        """Trainable parameters: all adapters together."""
        with self._fleet.drained() as adapters:
            return sum(p.numel() for adapter in adapters.values() for p in adapter.parameters())

    def record(self, batch: Batch, closing: Adaptation | None) -> Tensor:
        """Lines 3 to 9; with `closing`, fits of lines 10 to 16 start as their data arrives."""
        weight = self._weights.add(batch.num_terms)
        self._fleet.begin_step(self._fit(closing) if closing else None)
        with self._timer.measure(), self._taps.recording(self._version) as begin_backward:
            logits = self._base_model(**batch.inputs).logits
            loss = task_loss(self._objective, logits, batch)
            begin_backward()
            (loss * weight).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update(self, adaptation: Adaptation) -> None:
        """Starts the fits that had to wait for the whole backward pass; does not wait for any."""
        self._fleet.finish()
        self._weights.reset()
        self._version = adaptation.number

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The adapted model with the newest parameters, merged or not as configured."""
        with self._fleet.drained() as adapters:
            self._taps.install_all(self._version)
            self._base_model.eval()
            try:
                if self._evaluation_placement is None:
                    yield self._base_model
                else:
                    with self._taps.placed(self._evaluation_placement):
                        for site, adapter in adapters.items():
                            published = self._evaluation_placement.publish(adapter)
                            self._evaluation_placement.install(site, published)
                        yield self._base_model
            finally:
                set_training_mode(self._base_model)

    def export(self) -> Mapping[SiteName, Adapter]:
        """The adapters, with nothing under way."""
        with self._fleet.drained() as adapters:
            return adapters

    def state_dict(self) -> dict[str, Any]:
        """Adapters, optimizers, gradients of an interval in progress, and the version."""
        with self._fleet.drained():
            return {
                "fleet": self._fleet.state_dict(),
                "interval": self._weights.state_dict(),
                "version": self._version,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`; the next forward pass installs what was loaded."""
        self._version = state["version"]
        self._weights.load_state_dict(state["interval"])
        self._fleet.load_state_dict(state["fleet"], self._version)
        self._taps.forget()

    def measure(self) -> Measurements:
        """Costs so far."""
        held = self._fleet.held_bytes()
        tensors = [*self._base_model.parameters(), *self._base_model.buffers()]
        add_held(held, self._device, "base_model", count_bytes(tensors))
        extra = {}
        if isinstance(self._placement, Merger) and self._placement.lost_share:
            lost = dict(self._placement.lost_share)  # a copy: workers go on writing
            shares = torch.stack([share.cpu() for share in lost.values()])
            extra["merge/lost_share"] = float(shares.mean())
        stall = self._taps.stall_seconds
        return Measurements(
            base_seconds=self._timer.read() - stall,
            stall_seconds=stall,
            offload_seconds=self._fleet.busy_seconds(),
            wire_bytes=self._fleet.wire_bytes(self._taps.installed_bytes),
            held_bytes=held,
            extra=extra,
        )

    def close(self) -> None:
        """Takes the taps off and ends the workers."""
        self._taps.remove()
        self._fleet.stop()

    def _fit(self, closing: Adaptation) -> Fit:
        return Fit(
            number=closing.number,
            learning_rate=closing.learning_rate,
            gradient_scale=self._weights.scale(),
        )


def set_training_mode(base_model: nn.Module) -> None:
    """Dropout on, but the statistics of a frozen base's BatchNorm must not move."""
    base_model.train()
    for module in base_model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
