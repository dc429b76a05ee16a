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
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from many_users import Subject, builders

from cola.meters import MIB
from cola.report.text import format_table
from cola.runtime import resolve_device
from cola.summary import describe_machine

SWAPPING = ("swap", "set_adapter")


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
    overrides = [f"offload={arguments.offload}", *arguments.overrides]
    build = builders(overrides, rows=arguments.rows, length=arguments.length)
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
