"""Plain back-propagation: full fine-tuning and PEFT's methods, and the oracle of the tests.

Same loop, loss, optimizer and interval as gradient learning; only who computes the gradients
differs.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.utils import clip_grad_norm_

from cola.adaptation_data import IntervalWeights
from cola.adapters import Adapter
from cola.baselines.adalora import RankBudget
from cola.config.choices import ClipMode, Objective, Reduction
from cola.config.schema import OptimizerConfig
from cola.interfaces import Adaptation, Measurements
from cola.meters import BusyTimer, add_held, count_bytes
from cola.objectives import task_loss
from cola.optimizers import build_optimizer, optimizer_step
from cola.sites import SiteName
from cola.task_data import Batch
from cola.user_rows import EVERYONE, UserId, UserRows


class AutogradLearner:
    """Trains the given parameters of a model by its own backward pass."""

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        *,
        objective: Objective,
        optimizer: OptimizerConfig,
        reduction: Reduction,
        set_training_mode: Callable[[nn.Module], object],
        heads: Collection[str] = (),
        activation_offload: bool = False,
        adapters: Callable[[], Mapping[SiteName, Adapter]] = dict,
        ranks: RankBudget | None = None,
        save: Callable[[Path], None] | None = None,
    ) -> None:
        """Freezes everything that is not trainable.

        Args:
            model: called with a batch's inputs; returns an object with `logits`.
            trainable: parameters by name.
            objective: what the loss scores.
            optimizer: its clipping is over all parameters together.
            reduction: how the batches of an interval combine.
            set_training_mode: puts the model into training mode.
            heads: names of those trainable parameters that belong to new heads.
            activation_offload: tensors saved for the backward pass wait on the CPU.
            adapters: the trained adapters by site, for methods that have them.
            ranks: of AdaLoRA.
            save: writes what was trained, for methods without adapters, as a folder.
        """
        self._model = model
        self._trainable = dict(trainable)
        self._objective = objective
        self._optimizer = build_optimizer(
            self._trainable.values(), optimizer, heads=[self._trainable[name] for name in heads]
        )
        self._clip_norm = optimizer.clip_norm if optimizer.clip is ClipMode["global"] else None
        self._weights = IntervalWeights(reduction)
        self._set_training_mode = set_training_mode
        self._activation_offload = activation_offload
        self._adapters = adapters
        self._ranks = ranks
        self.save = save
        model.requires_grad_(False)
        for parameter in self._trainable.values():
            parameter.requires_grad_(True)
        self._device = next(model.parameters()).device
        self._timer = BusyTimer(self._device)
        set_training_mode(model)

    @property
    def num_trainable(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self._trainable.values())

    def record(self, batch: Batch, closing: Adaptation | None) -> Tensor:
        """Forward and backward pass; gradients accumulate inside an interval."""
        weight = self._weights.add(batch.num_terms)
        with self._timer.measure():
            with self._saved_tensors():
                loss = task_loss(self._objective, self._model(**batch.inputs).logits, batch)
            (loss * weight).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update(self, adaptation: Adaptation) -> None:
        """One optimizer step."""
        scale = self._weights.scale()
        with self._timer.measure():
            for parameter in self._trainable.values():
                if parameter.grad is not None and scale != 1.0:
                    parameter.grad.mul_(scale)
            if self._ranks is not None:
                # Here, so that it counts once whatever the interval, and the logged loss is the
                # task's alone.
                self._ranks.penalise()
            if self._clip_norm is not None:
                clip_grad_norm_(self._trainable.values(), self._clip_norm)
            optimizer_step(self._optimizer, adaptation.learning_rate)
            if self._ranks is not None:
                self._ranks.reallocate(adaptation.number)
            self._optimizer.zero_grad(set_to_none=True)
        self._weights.reset()

    @contextmanager
    def evaluating(self, merged: bool | None = None) -> Iterator[nn.Module]:
        """The model in evaluation mode; there is nothing to merge or not."""
        self._model.eval()
        try:
            yield self._model
        finally:
            self._set_training_mode(self._model)

    def route(self, rows: UserRows | None) -> None:
        """All rows are treated alike."""

    def present_users(self) -> None:
        """No user has adapters."""

    def export(self, user: UserId = EVERYONE) -> Mapping[SiteName, Adapter]:
        """The trained adapters."""
        return self._adapters()

    def state_dict(self) -> dict[str, Any]:
        """Trained parameters, buffers, optimizer, and gradients of an interval in progress."""
        parameters = self._trainable.items()
        return {
            "parameters": {name: parameter.detach() for name, parameter in parameters},
            "buffers": self._buffers(),
            "gradients": {name: p.grad for name, p in parameters if p.grad is not None},
            "optimizer": self._optimizer.state_dict()["state"],
            "interval": self._weights.state_dict(),
            "ranks": {} if self._ranks is None else self._ranks.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`."""
        for name, parameter in self._trainable.items():
            parameter.copy_(state["parameters"][name])
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter, copy=True)
        for name, buffer in self._buffers().items():
            buffer.copy_(state["buffers"][name])
        groups = self._optimizer.state_dict()["param_groups"]
        moments = {int(index): copy.deepcopy(value) for index, value in state["optimizer"].items()}
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self._weights.load_state_dict(state["interval"])
        if self._ranks is not None:
            self._ranks.load_state_dict(state["ranks"])

    def measure(self) -> Measurements:
        """Costs so far: everything happens on the base device."""
        gradients = [p.grad for p in self._trainable.values() if p.grad is not None]
        state = [v for s in self._optimizer.state.values() for v in s.values()]
        base = [*self._model.parameters(), *self._model.buffers()]
        held: dict[str, dict[str, int]] = {}
        add_held(held, self._device, "base_model", count_bytes(base))
        add_held(held, self._device, "gradients", count_bytes(gradients))
        moments = [value for value in state if isinstance(value, Tensor)]
        add_held(held, self._device, "optimizer", count_bytes(moments))
        extra = {} if self._ranks is None else {"adalora/ranks": float(self._ranks.ranks)}
        return Measurements(base_seconds=self._timer.read(), held_bytes=held, extra=extra)

    def close(self) -> None:
        """Nothing to release."""

    def _buffers(self) -> dict[str, Tensor]:
        """Buffers that belong to the model's state; copies of frozen weights do not."""
        stored = self._model.state_dict().keys()
        return {name: buffer for name, buffer in self._model.named_buffers() if name in stored}

    def _saved_tensors(self) -> AbstractContextManager[object]:
        if not self._activation_offload:
            return nullcontext()
        return save_on_cpu(pin_memory=self._device.type == "cuda")
