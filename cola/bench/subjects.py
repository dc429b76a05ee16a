"""What takes part in a computation table: a learner of this package, or the floor below all.

The floor is the frozen base model, forward and backward for hidden gradients alone, with nothing
captured, fitted or stepped: what gradient learning would cost the base device if the rest were
free.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from cola.bench.row import BenchRow
from cola.config.choices import Objective, OffloadTarget
from cola.config.user_settings import resolve_users
from cola.gradient_learner import set_training_mode
from cola.interfaces import Adaptation, Learner, Measurements
from cola.learners import build_learner
from cola.meters import BusyTimer, add_held, count_bytes
from cola.models import BaseModel
from cola.objectives import task_loss
from cola.task_data import Batch


class Subject(Protocol):
    """Something whose iterations are measured."""

    num_trainable: int

    def step(self, batch: Batch) -> None:
        """Issues one iteration: forward, backward, and every adapter one step further."""

    def finish(self) -> None:
        """Returns when nothing is under way on any device."""

    def costs(self) -> Measurements:
        """Costs so far."""

    def close(self) -> None:
        """Ends workers and lets go of the model."""


class Floor:
    """Forward and backward of the frozen base model, for hidden gradients only."""

    num_trainable = 0

    def __init__(self, base: BaseModel, objective: Objective) -> None:
        """Freezes the model and makes the first hidden representations require a gradient."""
        self._model = base.module.requires_grad_(False)
        self._objective = objective
        self._device = next(self._model.parameters()).device
        self._timer = BusyTimer(self._device)
        set_training_mode(self._model)
        for module in _first_modules(base):
            module.register_forward_hook(lambda module, args, hidden: hidden.requires_grad_())

    def step(self, batch: Batch) -> None:
        """Forward and backward."""
        with self._timer.measure():
            loss = task_loss(self._objective, self._model(**batch.inputs).logits, batch)
            loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Waits for the device."""
        synchronise([self._device])

    def costs(self) -> Measurements:
        """Time of the base part, which is all there is."""
        held: dict[str, dict[str, int]] = {}
        weights: list[Tensor] = [*self._model.parameters(), *self._model.buffers()]
        add_held(held, self._device, "base_model", count_bytes(weights))
        return Measurements(base_seconds=self._timer.read(), held_bytes=held)

    def close(self) -> None:
        """Nothing to end."""


class Trained:
    """A method of this package: Algorithm 1 with I = 1, or back-propagation."""

    def __init__(self, learner: Learner, devices: Sequence[torch.device], rate: float) -> None:
        """Takes the learner over; `devices` are those that work for it."""
        self._learner, self._devices, self._rate = learner, devices, rate
        self._number = 0
        self.num_trainable = learner.num_trainable

    def step(self, batch: Batch) -> None:
        """One batch, one adaptation."""
        self._number += 1
        adaptation = Adaptation(number=self._number, learning_rate=self._rate)
        self._learner.record(batch, adaptation)
        self._learner.update(adaptation)

    def finish(self) -> None:
        """Counting the parameters waits for every fit."""
        assert self._learner.num_trainable == self.num_trainable
        synchronise(self._devices)

    def costs(self) -> Measurements:
        """As a run logs them."""
        return self._learner.measure()

    def close(self) -> None:
        """Ends the workers."""
        self._learner.close()


def build_subject(
    row: BenchRow, base: BaseModel, objective: Objective, *, iterations: int
) -> Subject:
    """What a row measures, on a base model that is on its device; takes the model over.

    Args:
        row: which method.
        base: built for the row.
        objective: what the loss scores.
        iterations: that will be taken: AdaLoRA's budget then shrinks while it is measured, over the
            same shares of them as of a whole run.
    """
    if row.is_floor:
        return Floor(base, objective)
    config = row.config
    names = config.users.names or [f"user{number + 1}" for number in range(row.num_users)]
    users = resolve_users(config, names) if config.users.name.owns_adapters else ()
    learner = build_learner(config, base, objective, adaptations=iterations, users=users)
    assert config.optimizer.lr is not None, "defaults of rows are resolved"
    return Trained(learner, devices_of(row, base), config.optimizer.lr)


def devices_of(row: BenchRow, base: BaseModel) -> list[torch.device]:
    """The base device first, then the GPUs that fit."""
    first = next(base.module.parameters()).device
    if not row.is_cola or row.config.offload.name is not OffloadTarget.gpu:
        return [first]
    found = row.config.offload.device
    names = found or [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [first, *(device for name in names if (device := torch.device(name)) != first)]


def synchronise(devices: Iterable[torch.device]) -> None:
    """Waits for GPUs."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _first_modules(base: BaseModel) -> list[nn.Module]:
    """Whose outputs are the first hidden representations: embeddings of tokens, or layer one."""
    module = base.module
    with suppress(AttributeError):
        table = module.get_input_embeddings().weight  # type: ignore[operator]
        # An encoder-decoder looks the same table up in several places.
        return [
            one for one in module.modules() if isinstance(one, nn.Embedding) and one.weight is table
        ]
    return [module.get_submodule(next(iter(base.sites)))]
