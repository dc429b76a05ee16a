"""Time and memory of many users who share one batch, against a loop over them and against swapping.

    python scripts/user_scaling.py model=gpt2 --json docs/results/user_scaling.json

K users share a batch of short rows evenly, each with low-rank adapters of its own:

- `unmerged`, `merged`: this package, adapters beside the sites or inside their weights, fitted on
  the offload device (offload=cpu, or --offload none);
- `loop`: the same model by plain autograd, where every site loops over the users of the batch and
  one fused optimizer holds all adapters;
- `swap`: the PEFT library, which trains one adapter at a time: for every user in turn, its adapter
  is put in place, then forward, backward and step on its own rows; `set_adapter`: the same by the
  library's own call.

All live in one process and take turns; figures are medians over rounds, memory is each one's own.
Base part: the base device's busy time in forward and backward (all of an iteration for loop and
swap). Stall: the base device's host waits for parameters. Weights are random, of the model's true
shape.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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
from cola.meters import MIB
from cola.models import BaseModel, build_base_model
from cola.objectives import task_loss
from cola.report.text import format_table
from cola.runtime import resolve_device
from cola.sites import SiteKind
from cola.summary import describe_machine
from cola.task_data import Batch, Problem
from cola.user_rows import UserRows

RATE = 1e-4
STEPS = 10**6  # more than are ever taken
SWAPPING = ("swap", "set_adapter")


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


def builders(arguments: argparse.Namespace) -> dict[str, Callable[[int], Subject]]:
    """Every subject by name, as a function of K."""
    offload = f"offload={arguments.offload}"
    common = ["task=synthetic", "tracking=files", "adapter=lowrank", offload, *arguments.overrides]
    unmerged = compose_run([*common, "users=alone"]).config
    merged = compose_run([*common, "users=collaboration"]).config
    batch = build_batch(unmerged, arguments.rows, arguments.length)
    return {
        "unmerged": lambda num: Ours(unmerged, num, batch),
        "merged": lambda num: Ours(merged, num, batch),
        "loop": lambda num: Loop(unmerged, num, batch),
        "swap": lambda num: Swap(unmerged, num, batch),
        "set_adapter": lambda num: SetAdapter(unmerged, num, batch),
    }


def allocated(device: torch.device) -> int:
    """Bytes on a GPU now; a CPU has no allocator to ask."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Timed:
    """A subject that has warmed up, and what it was seen to cost."""

    def __init__(self, build: Callable[[int], Subject], name: str, num_users: int) -> None:
        self.name, self.num_users = name, num_users
        self._device = resolve_device("auto")
        before = allocated(self._device)
        self.subject = build(num_users)
        for _ in range(1 if name in SWAPPING else 2):
            self.subject.step()
        self.subject.finish()
        # All subjects are alive side by side: its own part is what it brought, states included.
        self._own_bytes = allocated(self._device) - before
        self.samples: list[dict[str, float]] = []
        self._peak_bytes = 0

    def run(self, steps: int) -> None:
        """Seconds per iteration, end to end and by part, over a few iterations."""
        self.subject.finish()
        others = allocated(self._device) - self._own_bytes
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        before, start = self.subject.costs(), time.perf_counter()
        for _ in range(steps):
            self.subject.step()
        self.subject.finish()
        seconds = (time.perf_counter() - start) / steps
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - others
            self._peak_bytes = max(self._peak_bytes, peak)
        after = self.subject.costs()
        parts = {name: (after[name] - before[name]) / steps for name in after}
        self.samples.append({"iteration": seconds, **parts})

    def row(self) -> dict[str, Any]:
        """Medians, and the spread of the whole iteration."""
        every = [sample["iteration"] for sample in self.samples]
        return {
            "subject": self.name,
            "users": self.num_users,
            "peak_mib": self._peak_bytes / MIB or None,
            **{key: statistics.median(s[key] for s in self.samples) for key in self.samples[0]},
            "iteration_spread": [min(every), max(every)],
            "rounds": len(every),
        }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per subject and K; all take turns, round after round."""
    build = builders(arguments)
    timed = []
    for name in arguments.subjects:
        for num_users in arguments.users:
            if name != "set_adapter" or num_users <= arguments.max_set_adapter:
                start = time.perf_counter()
                timed.append(Timed(build[name], name, num_users))
                seconds = time.perf_counter() - start
                sys.stderr.write(f"{name}, K = {num_users}: warm after {seconds:.1f} s\n")
    for number in range(arguments.rounds):
        for one in timed:
            if one.name not in SWAPPING:
                one.run(arguments.steps)
            elif number < arguments.swap_rounds:
                one.run(1)
    for one in timed:
        one.subject.close()
    return [one.row() for one in timed]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table of medians, with ratios to K = 1 and to swapping."""
    table = []
    for row in rows:
        find = {(other["subject"], other["users"]): other for other in rows}
        one, swap = find.get((row["subject"], 1)), find.get(("swap", row["users"]))
        base = row.get("base", row["iteration"])
        table.append(
            [
                row["subject"],
                str(row["users"]),
                "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
                f"{1e3 * base:.1f}",
                "-" if one is None else f"{base / one.get('base', one['iteration']):.2f}",
                *(f"{1e3 * row[key]:.1f}" if key in row else "-" for key in ("stall", "offload")),
                f"{1e3 * row['iteration']:.1f}",
                "-" if swap is None else f"{swap['iteration'] / row['iteration']:.1f}",
            ]
        )
    header = ["subject", "K", "peak MiB", "base ms", "x K=1", "stall ms", "offload ms",
              "end to end ms", "x faster than swap"]  # fmt: skip
    sys.stdout.write(format_table(header, table) + "\n")


def main() -> int:
    """Prints the table and writes all figures to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 64, 512])
    every = ["unmerged", "merged", "loop", "swap", "set_adapter"]
    parser.add_argument("--subjects", nargs="+", default=every, choices=every)
    parser.add_argument("--max-set-adapter", type=int, default=64, help="its time grows with K^2")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=16, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="per round; swapping takes one")
    parser.add_argument(
        "--swap-rounds", type=int, default=3, help="rounds that swapping takes part"
    )
    parser.add_argument("--offload", default="cpu", help="where adapters are fitted: cpu or none")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    rows = measure(arguments)
    show(rows)
    if arguments.json:
        result = {"command": sys.argv, **describe_machine(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
