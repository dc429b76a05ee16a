"""Time of one training step of every method on the small image models, side by side.

    python scripts/step_time.py data_dir=DATA --json docs/results/step_time.json

All methods of a model live in one process and take turns, so that each meets the same machine; the
figure of a method is the median over rounds of its time divided by full fine-tuning's. A step is
what a run does: the next batch, `record`, `update`, and a reading of the loss every tenth step.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cola.batches import BatchStream, place_rows
from cola.config.store import compose_run
from cola.experiment import build_problem, build_task
from cola.interfaces import Adaptation, Learner
from cola.learners import build_learner
from cola.models import build_base_model
from cola.report.text import format_table
from cola.runtime import resolve_device
from cola.summary import describe_machine
from cola.task_data import Batch

VARIANTS = {
    "full fine-tuning": ["method=ft"],
    "LoRA (PEFT)": ["method=lora"],
    "ColA low-rank": ["adapter=lowrank"],
    "ColA low-rank, merged": ["adapter=lowrank", "merge=merged", "merge.pristine=base"],
    "ColA linear": ["adapter=linear"],
    "ColA linear, merged": ["adapter=linear", "merge=merged", "merge.pristine=base"],
    "ColA MLP": ["adapter=mlp"],
}
REFERENCE = "full fine-tuning"
STEPS = 10**9  # the stream is left long before


class Subject:
    """One method on one model, ready to step."""

    def __init__(self, overrides: list[str]) -> None:
        config = compose_run(["task=mnist", "tracking=files", *overrides]).config
        device = resolve_device(config.device)
        problem = build_problem(config)
        base = build_base_model(config.model, problem, seed=config.seed)
        task = place_rows(build_task(config, problem, base), device)
        base.module.to(device)
        self._learner: Learner = build_learner(config, base, problem.objective, adaptations=STEPS)
        stream = BatchStream(
            task, batch_size=config.trainer.batch_size, seed=config.seed, device=device
        )
        self._batches: Iterator[tuple[int, Batch]] = stream.batches(1, STEPS)

    def seconds_per_step(self, num_steps: int) -> float:
        """Mean over some steps; ends with the device idle."""
        self._learner.measure()
        start = time.perf_counter()
        for _ in range(num_steps):
            step, batch = next(self._batches)
            closing = Adaptation(number=step, learning_rate=1e-3)
            loss = self._learner.record(batch, closing)
            self._learner.update(closing)
            if step % 10 == 0:
                loss.item()
        self._learner.measure()
        return (time.perf_counter() - start) / num_steps


def main() -> int:
    """Prints a table per model and writes all figures to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--models", nargs="+", default=["linear", "mlp"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="per method and round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    results: dict[str, Any] = {"command": sys.argv, **describe_machine(), "models": {}}
    for model in arguments.models:
        figures = measure(model, arguments)
        results["models"][model] = figures
        rows = [
            [name, f"{1e3 * figure['median_seconds']:.3f}", f"{figure['ratio']:.2f}",
             f"{min(figure['ratios']):.2f} to {max(figure['ratios']):.2f}"]
            for name, figure in figures.items()
        ]  # fmt: skip
        header = [model, "ms per step", "x full fine-tuning", "over rounds"]
        sys.stdout.write(format_table(header, rows) + "\n\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of every method in every round, and ratios to the reference."""
    subjects = {
        name: Subject([f"model={model}", *lines, *arguments.overrides])
        for name, lines in VARIANTS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for subject in subjects.values():
        subject.seconds_per_step(arguments.steps)  # warms up
    for _ in range(arguments.rounds):
        for name, subject in subjects.items():
            seconds[name].append(subject.seconds_per_step(arguments.steps))
    figures = {}
    for name, own in seconds.items():
        ratios = [mine / other for mine, other in zip(own, seconds[REFERENCE], strict=True)]
        figures[name] = {
            "median_seconds": statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return figures


if __name__ == "__main__":
    sys.exit(main())
