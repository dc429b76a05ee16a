"""Draws what runs when in consecutive iterations of gradient learning.

    python scripts/trace_iteration.py --out docs/figures/trace.png --json trace.json
    python scripts/trace_iteration.py model=tiny-llama --batch-size 32 --out trace.png
    python scripts/trace_iteration.py --from-json trace.json --out trace.png

Without a model it is Llama-2-7B's shape in its own settings (query and value, bfloat16), low-rank
adapters on the CPU. Weights and tokens are random, as in cola-bench. On a GPU a profiler says what
its streams did, and `base host` is the thread that launches it: kernels are forward or backward by
when they were launched. What that thread and the workers did is timed here, on every machine; a
marker that both see puts the two on one clock. The loss counts as backward.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trace_lanes import (
    ARRIVAL,
    BACKWARD,
    COUNT,
    FIT,
    FORWARD,
    HOST,
    WAIT,
    Interval,
    device_intervals,
    phases,
    plot_lanes,
    tidy,
    total_ms,
)

from cola.bench.batches import build_batches
from cola.bench.row import BenchRow
from cola.bench.rows import with_random_weights
from cola.bench.subjects import Subject, build_subject
from cola.config.choices import OffloadTarget, RowLengths
from cola.config.schema import ExperimentConfig
from cola.config.store import compose_run
from cola.errors import ColaError, ConfigError
from cola.experiment import build_problem
from cola.models import build_base_model
from cola.offload.fleet import Fleet
from cola.offload.transfer import Shipment
from cola.offload.worker import ThreadWorker
from cola.runtime import resolve_device, seed_everything, set_matmul_precision
from cola.summary import describe_machine

DEFAULTS = {"task": "dolly", "model": "llama-2-7b", "offload": "cpu", "task.padding": "max_length"}
CLOCK = "cola: one clock"


class Recorder:
    """Intervals of host threads, in ms of `time.perf_counter`; threads may share it."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []

    @contextlib.contextmanager
    def measure(self, lane: str, kind: str) -> Iterator[None]:
        """Times the block."""
        start = now()
        try:
            yield
        finally:
            self.intervals.append(Interval(lane, kind, start, now()))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, workers tell what they do, and whoever waits for data or parameters."""
        submitted, arrived, published = ThreadWorker.submit, Shipment.__call__, Fleet.wait

        def submit(worker: ThreadWorker, task: Callable[[], Any]) -> "Future[Any]":
            kind = FIT if ".fit." in task.__qualname__ else COUNT

            def timed() -> Any:
                with self.measure(this_worker(), kind):
                    return task()

            return submitted(worker, timed)

        def arrive(shipment: Shipment) -> Tensor:
            with self.measure(this_worker(), ARRIVAL):
                return arrived(shipment)

        def wait(fleet: Fleet, sites: Iterable[str], version: int) -> Any:
            sites = list(sites)
            if len(fleet.ready(sites, version)) == len(sites):
                return published(fleet, sites, version)
            with self.measure(HOST, WAIT):
                return published(fleet, sites, version)

        with (
            mock.patch.object(ThreadWorker, "submit", submit),
            mock.patch.object(Shipment, "__call__", arrive),
            mock.patch.object(Fleet, "wait", wait),
        ):
            yield


class Tracer:
    """A subject whose iterations are recorded."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Builds a model of the true shape with random weights, a learner and a batch."""
        self._device = resolve_device(config.device)
        set_matmul_precision(tf32=config.model.tf32, device=self._device)
        seed_everything(config.seed)
        problem = build_problem(config)
        base = build_base_model(config.model, problem, seed=config.seed, device=self._device)
        row = BenchRow(name="trace", label="trace", config=config, overrides=(), is_floor=False)
        self._batches = build_batches(row, base, problem, RowLengths.full)
        self._recorder = Recorder()
        self._subject: Subject = build_subject(row, base, problem.objective, iterations=10**6)
        self._marks: list[tuple[str, float]] = []
        base.module.register_forward_pre_hook(lambda *_: self._mark(FORWARD))
        base.module.register_forward_hook(lambda *_: self._mark(BACKWARD))

    def trace(self, num: int) -> list[Interval]:
        """Consecutive iterations, from an idle start to an idle end; 0 ms is their beginning."""
        self._recorder.intervals.clear()
        self._marks.clear()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        profiles = self._device.type == "cuda"
        with (
            torch.profiler.profile(activities=activities)
            if profiles
            else contextlib.nullcontext() as profiler
        ):
            clock = now()
            with torch.profiler.record_function(CLOCK):
                pass
            with self._recorder.watching():
                for _ in range(num):
                    self._subject.step(self._batches[0])
                    self._mark("")
                self._subject.finish()
        found = [*self._recorder.intervals, *phases(self._marks)]
        if profiler is not None:
            events = chrome_events(profiler)
            shift = clock - next(e["ts"] for e in events if e.get("name") == CLOCK) / 1000
            found += device_intervals(events, self._marks, shift, self._device.index or 0)
        return tidy(found)

    def close(self) -> None:
        """Ends the workers."""
        self._subject.close()

    def _mark(self, phase: str) -> None:
        self._marks.append((phase, now()))


def now() -> float:
    """Milliseconds."""
    return 1000 * time.perf_counter()


def this_worker() -> str:
    """Its name, without the number that an executor adds."""
    return threading.current_thread().name.rpartition("_")[0]


def chrome_events(profiler: torch.profiler.profile) -> list[dict[str, Any]]:
    """Events of a trace in Chrome's format, which is the same in all versions; times in us."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def compose(overrides: Sequence[str], batch_size: int) -> ExperimentConfig:
    """The configuration, Llama-2-7B's unless told otherwise.

    Raises:
        ConfigError: what cannot run, or has no workers to draw.
    """
    given = {override.partition("=")[0] for override in overrides}
    usual = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in given]
    run = compose_run([*usual, f"trainer.batch_size={batch_size}", *overrides])
    config = with_random_weights(run.config, run.given)
    if config.offload.name is OffloadTarget.none:
        raise ConfigError("offload=none: there are no workers to draw; use offload=cpu or gpu")
    return config


def record(config: ExperimentConfig, warmup: int, iterations: int) -> dict[str, Any]:
    """Intervals of the iterations, with what they were obtained with."""
    tracer = Tracer(config)
    try:
        tracer.trace(warmup)  # a profiler's first use is slow, too
        intervals = tracer.trace(iterations)
    finally:
        tracer.close()
    title = (
        f"{config.model.name}, {config.adapter.kind.name}, {config.merge.mode.name}, "
        f"offload={config.offload.name.name}, batch size {config.trainer.batch_size}"
    )
    return {
        "command": " ".join(sys.argv),
        **describe_machine(),
        "title": title,
        "intervals": intervals,
    }


def main() -> int:
    """Records or reads a trace, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3, help="iterations before")
    parser.add_argument("--out", type=Path, default=Path("trace.png"), help="the picture")
    parser.add_argument("--json", type=Path, help="write the intervals here")
    parser.add_argument("--from-json", type=Path, help="draw these, record nothing")
    arguments = parser.parse_intermixed_args()
    if min(arguments.warmup, arguments.iterations) < 1:
        parser.error("--warmup and --iterations: whole numbers >= 1")
    if arguments.from_json:
        trace = json.loads(arguments.from_json.read_text(encoding="utf-8"))
    else:
        try:
            config = compose(arguments.overrides, arguments.batch_size)
            trace = record(config, arguments.warmup, arguments.iterations)
        except ColaError as error:
            sys.stderr.write(f"{parser.prog}: {error}\n")
            return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(trace) + "\n", encoding="utf-8")
    intervals = [Interval(*one) for one in trace["intervals"]]
    plot_lanes(intervals, trace["title"], arguments.out)
    waited = total_ms(intervals, WAIT)
    sys.stdout.write(f"{arguments.out}: the base model's host waited {waited:.2f} ms\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
