"""Who trains many users on one batch: this package, a loop over them, or swapped PEFT adapters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cola.adapters import LowRankAdapter, build_adapter
from cola.config.choices import ModelSource, Objective
from cola.config.schema import AdapterConfig, ExperimentConfig
from cola.config.store import compose_run
from cola.config.user_settings import resolve_users
from cola.interfaces import Adaptation
from cola.learners import build_learner
from cola.models import BaseModel, build_base_model
from cola.objectives import task_loss
from cola.runtime import resolve_device
from cola.sites import SiteKind
from cola.task_data import Batch, Problem
from cola.user_rows import UserRows

RATE = 1e-4
STEPS = 10**6  # more than are ever taken


class Subject(Protocol):
    """Something that trains all users on a batch."""

    def step(self) -> None:
        """One iteration: every user's adapters are one step further."""

    def finish(self) -> None:
        """Waits for what steps may have left under way."""

    def costs(self) -> dict[str, float]:
        """Seconds and bytes so far, by part."""

    def close(self) -> None:
        """Lets go of everything."""


class Ours:
    """This package."""

    def __init__(self, config: ExperimentConfig, num_users: int, batch: Batch) -> None:
        users = resolve_users(config, [f"user{index}" for index in range(num_users)])
        base = build_model(config)
        self._learner = build_learner(
            config, base, Objective.causal, adaptations=STEPS, users=users
        )
        own_rows = len(batch.labels) // num_users
        self._batch = dataclasses.replace(
            batch,
            rows=UserRows(users=tuple(range(num_users)), counts=(own_rows,) * num_users),
            row_terms=torch.full((len(batch.labels),), batch.num_terms // len(batch.labels)),
        )
        self._number = 0

    def step(self) -> None:
        """Algorithm 1 with I = 1."""
        self._number += 1
        closing = Adaptation(number=self._number, learning_rate=RATE)
        self._learner.record(self._batch, closing)
        self._learner.update(closing)

    def finish(self) -> None:
        """Counting the parameters waits for every fit."""
        assert self._learner.num_trainable
        synchronise(self._batch.labels.device)

    def costs(self) -> dict[str, float]:
        """As a run logs them."""
        measured = self._learner.measure()
        return {
            "base": measured.base_seconds,
            "stall": measured.stall_seconds,
            "offload": measured.offload_seconds,
            "wire_bytes": float(measured.wire_bytes),
        }

    def close(self) -> None:
        """Ends the workers."""
        self._learner.close()


class Loop:
    """Plain autograd: every site loops over the users, one optimizer steps all adapters."""

    def __init__(self, config: ExperimentConfig, num_users: int, batch: Batch) -> None:
        base = build_model(config)
        self._model, self._batch = base.module.train().requires_grad_(False), batch
        self._parts = torch.arange(len(batch.labels)).chunk(num_users)
        device, self._dtype = batch.labels.device, next(self._model.parameters()).dtype
        self._adapters: dict[str, list[LowRankAdapter]] = {}
        settings = AdapterConfig(kind=config.adapter.kind, rank=config.adapter.rank)
        for name, spec in base.sites.items():
            built = [
                build_adapter(settings, spec, seed=0, user=str(user)).to(device)
                for user in range(num_users)
            ]
            self._adapters[name] = [one for one in built if isinstance(one, LowRankAdapter)]
            self._model.get_submodule(name).register_forward_hook(self._hook(name))
        everything = [p for own in self._adapters.values() for one in own for p in one.parameters()]
        self._optimizer = torch.optim.AdamW(everything, lr=RATE, weight_decay=5e-4, fused=True)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def adapt(module: nn.Module, args: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
            deltas = [
                (args[0][rows[0] : rows[-1] + 1] @ one.lora_a.to(self._dtype).T)
                @ one.lora_b.to(self._dtype).T
                for rows, one in zip(self._parts, self._adapters[name], strict=True)
            ]
            return hidden + torch.cat(deltas)

        return adapt

    def step(self) -> None:
        """Forward, backward, step."""
        logits = self._model(**self._batch.inputs).logits
        task_loss(Objective.causal, logits, self._batch).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def finish(self) -> None:
        """Waits for the device."""
        synchronise(self._batch.labels.device)

    def costs(self) -> dict[str, float]:
        """An iteration has one part."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


class Swap:
    """The PEFT library: one adapter at a time, user after user.

    The user's own parameters are put into the one adapter that PEFT holds. This is the cheapest
    form of swapping: PEFT's own `set_adapter` over K adapters visits all of them each time.
    """

    def __init__(self, config: ExperimentConfig, num_users: int, batch: Batch) -> None:
        from peft import LoraConfig, get_peft_model

        base = build_model(config)
        rank = config.adapter.rank
        is_conv1d = any(spec.kind is SiteKind.conv1d for spec in base.sites.values())
        self._lora = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(base.sites), fan_in_fan_out=is_conv1d
        )
        self._model: Any = get_peft_model(base.module, self._lora, adapter_name="user0")
        self._model.train()
        self._device = batch.labels.device
        self._batches = [
            Batch(
                inputs={key: tensor[rows] for key, tensor in batch.inputs.items()},
                labels=batch.labels[rows],
                num_terms=batch.num_terms,  # a user's part of the whole batch's mean
            )
            for rows in torch.arange(len(batch.labels), device=self._device).chunk(num_users)
        ]
        self._users = self._make_users(num_users)
        self._optimizers = [
            torch.optim.AdamW(own.values(), lr=RATE, weight_decay=5e-4, fused=True)
            for own in self._users
        ]

    def _make_users(self, num_users: int) -> list[dict[str, nn.Parameter]]:
        own = {name: p for name, p in self._model.named_parameters() if "lora_" in name}
        return [
            {name: nn.Parameter(p.detach().clone()) for name, p in own.items()}
            for _ in range(num_users)
        ]

    def _activate(self, user: int) -> None:
        for path, parameter in self._users[user].items():
            owner, _, leaf = path.rpartition(".")
            setattr(self._model.get_submodule(owner), leaf, parameter)

    def step(self) -> None:
        """Every user in turn."""
        for user, batch in enumerate(self._batches):
            self._activate(user)
            logits = self._model(**batch.inputs).logits
            task_loss(Objective.causal, logits, batch).backward()
            self._optimizers[user].step()
            self._optimizers[user].zero_grad()

    def finish(self) -> None:
        """Waits for the device."""
        synchronise(self._device)

    def costs(self) -> dict[str, float]:
        """An iteration has one part."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


class SetAdapter(Swap):
    """The PEFT library as documented: K adapters in one model, `set_adapter` for each user."""

    def _make_users(self, num_users: int) -> list[dict[str, nn.Parameter]]:
        for user in range(1, num_users):
            self._model.add_adapter(f"user{user}", self._lora)
        users: list[dict[str, nn.Parameter]] = [{} for _ in range(num_users)]
        for path, parameter in self._model.named_parameters():
            if "lora_" in path:
                users[int(path.split(".")[-2].removeprefix("user"))][path] = parameter
        return users

    def _activate(self, user: int) -> None:
        self._model.set_adapter(f"user{user}")


def synchronise(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_model(config: ExperimentConfig) -> BaseModel:
    """The base model of a configuration with random weights, on its device."""
    model = dataclasses.replace(config.model, source=ModelSource.random, path=None)
    problem = Problem(objective=Objective.causal, num_labels=0, image_shape=None, max_length=128)
    base = build_base_model(model, problem, seed=0)
    base.module.to(resolve_device(config.device))
    return base


def build_batch(config: ExperimentConfig, rows: int, length: int) -> Batch:
    """Rows of random tokens without padding."""
    device = resolve_device(config.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (rows, length), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs=inputs, labels=ids, num_terms=rows * (length - 1))


def builders(
    overrides: Sequence[str], *, rows: int, length: int
) -> dict[str, Callable[[int], Subject]]:
    """Every subject by name, as a function of K, for batches of rows of so many tokens."""
    common = ["task=synthetic", "tracking=files", "adapter=lowrank", *overrides]
    unmerged = compose_run([*common, "users=alone"]).config
    merged = compose_run([*common, "users=collaboration"]).config
    batch = build_batch(unmerged, rows, length)
    return {
        "unmerged": lambda num: Ours(unmerged, num, batch),
        "merged": lambda num: Ours(merged, num, batch),
        "loop": lambda num: Loop(unmerged, num, batch),
        "swap": lambda num: Swap(unmerged, num, batch),
        "set_adapter": lambda num: SetAdapter(unmerged, num, batch),
    }
