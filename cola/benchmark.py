"""`cola-bench`: the computation evaluation. Paper: section 4.5 and Tables 10 to 18.

Measures row after row, each on a base model of its own that is built where it runs: what a row left
behind, or broke, cannot reach the next. What is known is written after every row, so that a call
that was interrupted, or had too little time, goes on where it stopped. A row that does not fit says
so and the rest goes on.
"""

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cola.bench.batches import build_batches, count_tokens
from cola.bench.limits import does_not_fit
from cola.bench.measure import measure
from cola.bench.results import Results
from cola.bench.row import BenchRow
from cola.bench.subjects import build_subject, devices_of
from cola.config.choices import OffloadTarget
from cola.config.schema import BenchConfig
from cola.config.validation import validate
from cola.errors import ColaError
from cola.experiment import build_problem, check_sites
from cola.models import build_base_model
from cola.report.bench_figure import plot_costs
from cola.report.bench_table import cost_table
from cola.report.text import print_text
from cola.runtime import resolve_device, seed_everything, set_matmul_precision
from cola.shortage import shortages

logger = logging.getLogger(__name__)

TABLE_FILE, FIGURE_FILE = "table.md", "figure.png"


def run_benchmark(
    rows: Sequence[BenchRow], bench: BenchConfig, folder: Path, command: Sequence[str]
) -> bool:
    """Measures the rows that a folder lacks; writes table and figure of all that it has.

    Args:
        rows: of one table.
        bench: how they are measured.
        folder: made here; gets `results.json`, `table.md` and `figure.png`.
        command: how this was called: program and overrides.

    Returns:
        Whether every row was measured, does not fit, or needs another machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder, bench, command)
    pending = [row for row in rows if bench.redo or not results.has(row)]
    logger.info("%d rows, %d to measure, into %s", len(rows), len(pending), folder)
    went_well = True
    try:
        with logging_redirect_tqdm(), tqdm(pending, unit="row", dynamic_ncols=True) as bar:
            for row in bar:
                bar.set_description(row.name)
                found = measure_row(row, bench)
                results.put(row, row.facts(bench) | found)
                went_well &= "failed" not in found
    finally:
        (folder / TABLE_FILE).write_text(cost_table(results.rows) + "\n", encoding="utf-8")
        plot_costs(results.rows, folder / FIGURE_FILE)
    print_text(cost_table(results.rows))
    return went_well


def measure_row(row: BenchRow, bench: BenchConfig) -> dict[str, Any]:
    """Figures of a row, or the one word why there are none; leaves nothing on any device."""
    if row.offload == OffloadTarget.gpu.name and torch.cuda.device_count() < 2:
        return {"skipped": "needs a second GPU"}
    found = _attempt(row, bench)
    # Not inside: a frame of a failed attempt would still hold its tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _attempt(row: BenchRow, bench: BenchConfig) -> dict[str, Any]:
    try:
        return _measure(row, bench)
    except Exception as error:
        message = str(error).partition("\n")[0]
        if does_not_fit(error):
            logger.warning("%s does not fit: %s", row.name, message)
            return {"does_not_fit": message}
        if isinstance(error, ColaError):
            logger.error("%s: %s", row.name, message)
        else:
            logger.exception("%s failed", row.name)
        return {"failed": message or type(error).__name__}


def _measure(row: BenchRow, bench: BenchConfig) -> dict[str, Any]:
    config = row.config
    validate(config)
    device = resolve_device(config.device)
    set_matmul_precision(tf32=config.model.tf32, device=device)
    seed_everything(config.seed)
    problem = build_problem(config)
    base = build_base_model(config.model, problem, seed=config.seed, device=device)
    check_sites(config, base)
    if row.is_cola and (lacking := shortages(config, base, device)):
        raise MemoryError(lacking[0])  # of a host, the rows to come would end with this one
    batches = build_batches(row, base, problem, bench.lengths)
    devices = devices_of(row, base)
    iterations = bench.warmup + 2 * bench.iterations + 1  # as `measure` takes them
    subject = build_subject(row, base, problem.objective, iterations=iterations)
    try:
        found = measure(subject, batches, devices, warmup=bench.warmup, iterations=bench.iterations)
    finally:
        subject.close()
    all_tokens, real_tokens = count_tokens(batches[0], problem)
    return {
        "trainable_parameters": subject.num_trainable,
        "base_parameters": base.num_parameters,
        "sites": len(base.sites),
        "tokens": all_tokens,
        "real_tokens": real_tokens,
        "tokens_per_second": all_tokens / found["seconds"],
        "real_tokens_per_second": real_tokens / found["seconds"],
        "offload_seconds_per_adapter": found["synchronised"]["offload_seconds"][0]
        / (len(base.sites) * row.num_users),
        **memory_columns(row, found, str(devices[0])),
        **found,
    }


def memory_columns(row: BenchRow, found: dict[str, Any], base_device: str) -> dict[str, float]:
    """The paper's two columns of memory, in MiB.

    Base: the peak that was allocated on the base device; on a CPU, which has no allocator to ask,
    what its owners hold, without activations. Offload: what adapters, gradients, optimizer states,
    staging and weights to merge hold where adapters are fitted; on a GPU of their own, its peak.
    """
    peaks = found["peak_allocated_mib"]
    held = {device: sum(owners.values()) for device, owners in found["held_mib"].items()}
    weights = found["held_mib"][base_device]["base_model"]
    if not row.is_cola:
        return {"base_mib": peaks.get(base_device, held[base_device]), "offload_mib": 0.0}
    if row.offload == OffloadTarget.gpu.name:
        offload = sum(peak for device, peak in peaks.items() if device != base_device)
    elif row.offload == OffloadTarget.cpu.name and base_device != "cpu":
        offload = held["cpu"]
    else:
        offload = sum(held.values()) - weights
    return {"base_mib": peaks.get(base_device, weights), "offload_mib": offload}
