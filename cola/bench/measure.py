"""Times and memory of a subject, over iterations that nothing else disturbs.

Twice the same number of iterations: one by one, each until nothing is under way on any device,
which tells the parts of an iteration apart; then back to back, each behind one that has fits under
way as it has itself, which is what a training run sees. Peaks of memory are over both.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from typing import Any

import torch

from cola.bench.subjects import Subject
from cola.interfaces import Measurements
from cola.meters import MIB, peak_allocated, reset_peaks
from cola.task_data import Batch

SLOW_SECONDS = 5.0
"""An iteration that takes longer is repeated less often."""

SLOW_ITERATIONS = 3


def measure(
    subject: Subject,
    batches: Sequence[Batch],
    devices: Sequence[torch.device],
    *,
    warmup: int,
    iterations: int,
) -> dict[str, Any]:
    """Measures a subject; units are in the keys.

    Args:
        subject: fresh; its first iterations warm it up.
        batches: taken in turn.
        devices: the base device first, then others that have peaks of their own.
        warmup: iterations that are not measured.
        iterations: of each of the two ways, unless they are slow.
    """
    stream = cycle(batches)

    def step() -> None:
        subject.step(next(stream))

    is_slow = _warm_up(step, subject.finish, warmup) > SLOW_SECONDS
    num = min(iterations, SLOW_ITERATIONS) if is_slow else iterations
    reset_peaks(devices)
    parts = _one_by_one(step, subject, num)
    together = _back_to_back(step, subject, num, devices[0])
    held = subject.costs().held_bytes
    gpus = [device for device in devices if device.type == "cuda"]
    return {
        "iterations": num,
        **together,
        "synchronised": parts,
        "peak_allocated_mib": {str(gpu): peak_allocated(gpu, held) / MIB for gpu in gpus},
        "peak_reserved_mib": {str(gpu): torch.cuda.max_memory_reserved(gpu) / MIB for gpu in gpus},
        "held_mib": {
            device: {owner: num / MIB for owner, num in owners.items()}
            for device, owners in held.items()
        },
    }


def _warm_up(step: Callable[[], None], finish: Callable[[], None], times: int) -> float:
    """Seconds of the last iteration; ends early once a later one than the first is slow."""
    seconds = 0.0
    for index in range(times):
        seconds = _seconds(step, finish)
        if index and seconds > SLOW_SECONDS:
            break
    return seconds


def _seconds(*calls: Callable[[], None]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _one_by_one(step: Callable[[], None], subject: Subject, num: int) -> dict[str, Any]:
    """Median, smallest and largest seconds of an iteration and of its parts."""
    subject.finish()
    samples = []
    for _ in range(num):
        before = subject.costs()
        seconds = _seconds(step, subject.finish)
        samples.append({"iteration": seconds, **_parts(before, subject.costs())})
    return {f"{key}_seconds": _spread([sample[key] for sample in samples]) for key in samples[0]}


def _back_to_back(
    step: Callable[[], None], subject: Subject, num: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of an iteration among others, from the end of the one before: median and spread.

    The first one has nothing to wait for: it is not counted, but that it costs what others cost.
    """
    subject.finish()
    before = subject.costs()
    step()
    marks = [_mark(device)]
    for _ in range(num):
        step()
        marks.append(_mark(device))
    subject.finish()
    after = subject.costs()
    intervals = [_interval(first, second) for first, second in pairwise(marks)]
    seconds = statistics.median(intervals)
    steps = num + 1
    parts = {f"{key}_seconds": value / steps for key, value in _parts(before, after).items()}
    return {
        "seconds": seconds,
        "seconds_mean": statistics.mean(intervals),
        "seconds_spread": [min(intervals), max(intervals)],
        **parts,
        "stall_share": parts["stall_seconds"] / seconds,
        "sent_bytes": (_sent(after) - _sent(before)) / steps,
        "returned_bytes": (after.returned_bytes - before.returned_bytes) / steps,
        "extra": after.extra,
    }


Mark = float | torch.cuda.Event


def _mark(device: torch.device) -> Mark:
    """The end of an iteration as the base device sees it; waits for nothing."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _interval(first: Mark, second: Mark) -> float:
    """Seconds between two marks of one device, both passed."""
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first
    return float(first.elapsed_time(second)) / 1000


def _parts(before: Measurements, after: Measurements) -> dict[str, float]:
    return {
        "base": after.base_seconds - before.base_seconds,
        "offload": after.offload_seconds - before.offload_seconds,
        "stall": after.stall_seconds - before.stall_seconds,
    }


def _sent(measured: Measurements) -> int:
    """Adaptation data that left the base device."""
    return measured.wire_bytes - measured.returned_bytes


def _spread(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]
