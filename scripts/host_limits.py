"""What bounds an iteration of linear adapters that are fitted on the host, and by how much.

    python scripts/host_limits.py --seconds 1.9 --json docs/results/host_limits.json
    python scripts/host_limits.py model=tiny-llama --batch-size 2

Every part of a fit is timed by itself, at every shape of site, on all cores at once in as many
threads as a run has workers: the product that forms a gradient and its conversion to float32 (both
are left out with `offload.payload=gradient`), AdamW's step, and the sum with the pristine weight,
rounded to the base model's dtype. Nothing waits for anything, so that their sum is what the host's
arithmetic and memory allow; the wire, which works beside them, is a limit of its own. `--seconds`
is what an iteration took (cola-bench), to be divided by the larger of the two.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola.bench.rows import with_random_weights
from cola.config.choices import AdapterKind, MergeMode
from cola.config.schema import ExperimentConfig
from cola.config.store import compose_run
from cola.errors import ColaError, ConfigError
from cola.experiment import build_problem
from cola.models import build_base_model
from cola.offload.placing import CORES_PER_WORKER
from cola.optimizers import build_optimizer
from cola.report.text import format_table
from cola.rounded_sums import Update, add_rounded
from cola.runtime import product_dtype
from cola.summary import describe_machine

DEFAULTS = {
    "task": "dolly",
    "model": "llama-2-7b",
    "model.sites": "[all]",
    "adapter": "linear",
    "merge": "merged",
}
ROUNDS = 5
WIRE_BYTES = 256 << 20

Shape = tuple[int, int]
Work = Callable[[], object]


def on_all_cores(make: Callable[[], Work]) -> float:
    """Seconds of one piece of work where every worker has one: median over rounds, by worker.

    Args:
        make: allocates what a worker needs and returns its work.
    """
    cores = torch.get_num_threads()
    num = max(1, cores // CORES_PER_WORKER)
    limit = partial(torch.set_num_threads, max(1, cores // num))
    seconds = []
    with ThreadPoolExecutor(num, initializer=limit) as pool:
        works = list(pool.map(lambda _: make(), range(num)))
        for _ in range(1 + ROUNDS):  # the first one warms up
            start = time.perf_counter()
            list(pool.map(lambda work: work(), works))
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / num


def host_parts(shape: Shape, num_rows: int, config: ExperimentConfig) -> dict[str, float]:
    """Seconds of each part of a fit of one site of (H, D), with all cores at work."""
    dtype = getattr(torch, config.model.dtype.name)

    def product() -> Work:
        like = torch.empty(0, dtype=dtype)
        used = product_dtype(like, torch.float32)
        x = torch.randn(num_rows, shape[1]).to(used)
        g = torch.randn(num_rows, shape[0]).to(used)
        out = torch.empty(shape, dtype=used)
        return lambda: torch.mm(g.T, x, out=out)

    def conversion() -> Work:
        gradient = torch.randn(shape).to(dtype)
        out = torch.empty(shape)
        return lambda: out.copy_(gradient)

    def step() -> Work:
        weight = torch.zeros(shape, requires_grad=True)
        weight.grad = torch.randn(shape)
        optimizer = build_optimizer([weight], config.optimizer, heads=[])
        return optimizer.step

    def merge() -> Work:
        pristine, out = torch.randn(shape).to(dtype), torch.empty(shape, dtype=dtype)
        update = Update(torch.randn(shape))
        return lambda: add_rounded(pristine, update, out, scale=1.0)

    parts = {"product": product, "conversion": conversion, "step": step, "merge": merge}
    return {name: on_all_cores(make) for name, make in parts.items()}


def wire_rates() -> dict[str, float]:
    """GB/s from and to the GPU, in pinned memory; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    here = torch.empty(WIRE_BYTES, dtype=torch.uint8, device="cuda")
    there = torch.empty(WIRE_BYTES, dtype=torch.uint8, pin_memory=True)
    return {"out": _copy_rate(here, there), "back": _copy_rate(there, here)}


def _copy_rate(source: Tensor, target: Tensor) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return WIRE_BYTES / 1e9 / statistics.median(seconds[1:])


def limits(config: ExperimentConfig, num_rows: int) -> dict[str, Any]:
    """Seconds of an iteration's parts over all sites, for both payloads, and their limits."""
    base = build_base_model(config.model, build_problem(config), seed=config.seed, on_meta=True)
    shapes = Counter((spec.out_features, spec.in_features) for spec in base.sites.values())
    totals: Counter[str] = Counter()
    for shape, num in shapes.items():
        for name, seconds in host_parts(shape, num_rows, config).items():
            totals[name] += num * seconds
    size = getattr(torch, config.model.dtype.name).itemsize
    weights = sum(num * h * d for (h, d), num in shapes.items())
    factors = sum(num * num_rows * (h + d) for (h, d), num in shapes.items())
    rates = wire_rates()
    sent = {"factors": factors * size, "gradient": weights * torch.float32.itemsize}
    wires = {
        name: max(out / 1e9 / rates["out"], weights * size / 1e9 / rates["back"])
        for name, out in sent.items()
        if rates
    }
    hosts = {
        "factors": sum(totals.values()),
        "gradient": totals["step"] + totals["merge"],
    }
    return {
        "num_rows": num_rows,
        "sites": {f"{h}x{d}": num for (h, d), num in shapes.items()},
        "parameters": weights,
        "product_tflop": 2e-12 * weights * num_rows,
        "host_seconds": dict(totals),
        "wire_gb_per_second": rates,
        "host_limit_seconds": hosts,
        "wire_limit_seconds": wires,
        "limit_seconds": {name: max(hosts[name], wires.get(name, 0.0)) for name in hosts},
    }


def compose(overrides: Sequence[str], batch_size: int) -> ExperimentConfig:
    """The configuration: merged linear adapters, on all layers of Llama-2-7B's shape unless said.

    Raises:
        ConfigError: what cannot run, or has other adapters.
    """
    given = {override.partition("=")[0] for override in overrides}
    usual = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in given]
    run = compose_run([*usual, f"trainer.batch_size={batch_size}", *overrides])
    adapter, merge = run.config.adapter.kind, run.config.merge.mode
    if adapter is not AdapterKind.linear or merge is not MergeMode.merged:
        raise ConfigError(
            f"adapter={adapter.name} merge={merge.name}: what is measured are parts of the fit of "
            "linear adapters that are merged; leave both out"
        )
    return with_random_weights(run.config, run.given)


def main() -> int:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batch-size", type=int, default=8, help="of rows of task.max_length")
    parser.add_argument("--seconds", type=float, help="of an iteration, to be compared")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_intermixed_args()
    try:
        config = compose(arguments.overrides, arguments.batch_size)
    except ColaError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    found = limits(config, arguments.batch_size * config.task.max_length)
    if arguments.json:
        facts = {"command": " ".join(sys.argv), **describe_machine(), **found}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    parts = [[name, f"{seconds:.3f}"] for name, seconds in found["host_seconds"].items()]
    sys.stdout.write(format_table(["part, all sites", "seconds"], parts) + "\n")
    rows = [
        [
            name,
            f"{found['host_limit_seconds'][name]:.3f}",
            f"{found['wire_limit_seconds'].get(name, float('nan')):.3f}",
            f"{arguments.seconds / limit:.2f}" if arguments.seconds else "-",
        ]
        for name, limit in found["limit_seconds"].items()
    ]
    heads = ["payload", "host, s", "wire, s", "measured / limit"]
    sys.stdout.write("\n" + format_table(heads, rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
