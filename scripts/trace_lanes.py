"""What ran on which lane and when: from a profiler's events, and as a picture.

`trace_iteration.py` records. Lanes, from the top: the base device's stream, the host that launches
its work, copies out and back, one lane for each worker or stream of another GPU. Times are in ms.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STREAM, HOST, OUT, BACK = "base stream", "base host", "copies out", "copies back"
FORWARD, BACKWARD, WAIT = "forward", "backward", "wait for parameters"
COUNT, FIT, ARRIVAL, OTHER = "count in", "fit, publish", "wait for data", "other"
# Okabe and Ito: told apart without colour vision.
COLOURS = {
    FORWARD: "#56B4E9",
    BACKWARD: "#0072B2",
    OUT: "#E69F00",
    BACK: "#CC79A7",
    COUNT: "#009E73",
    FIT: "#D55E00",
    WAIT: "#000000",
    ARRIVAL: "#BBBBBB",
    OTHER: "#F0E442",
}
ON_TOP = (WAIT, ARRIVAL)  # drawn over the bar that they are part of
PIXELS = 2000  # gaps of less than such a part of the picture are closed
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


class Interval(NamedTuple):
    """Something that ran on a lane; times in ms."""

    lane: str
    kind: str
    start: float
    end: float


def phases(marks: Sequence[tuple[str, float]]) -> list[Interval]:
    """What the base model's host was in from each mark to the next; "" is between iterations."""
    ends = [moment for _, moment in marks[1:]]
    return [
        Interval(HOST, phase, start, end)
        for (phase, start), end in zip(marks, ends, strict=False)
        if phase
    ]


def device_intervals(
    events: Iterable[Mapping[str, Any]],
    marks: Sequence[tuple[str, float]],
    shift: float,
    base: int,
) -> list[Interval]:
    """Kernels and copies of GPUs by lane.

    Args:
        events: of a profiler, in Chrome's format.
        marks: when the host began which phase, ms: kernels belong to the phase that launched them,
            however much later they run.
        shift: ms to add to the events' times.
        base: index of the base model's GPU.
    """
    events = list(events)
    work = [event for event in events if event.get("cat") in _GPU_WORK]
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    lanes = _lanes(work, base)
    found = []
    for event in work:
        lane = lanes[_stream(event)]
        launched = launches.get(event["args"].get("correlation"), event["ts"]) / 1000 + shift
        kind = _phase_at(launched, marks) if lane == STREAM else lane
        start = event["ts"] / 1000 + shift
        kind = kind if kind in COLOURS else FIT if lane.startswith("stream of") else OTHER
        found.append(Interval(lane, kind, start, start + event["dur"] / 1000))
    return found


def _lanes(work: Sequence[Mapping[str, Any]], base: int) -> dict[tuple[int, int], str]:
    """The lane of each stream: the busiest of the base GPU computes, copies say what others do."""
    busy: Counter[tuple[int, int]] = Counter()
    copies: dict[tuple[int, int], Counter[str]] = {}
    for event in work:
        stream = _stream(event)
        copies.setdefault(stream, Counter())
        if event["cat"] == "kernel":
            busy[stream] += event["dur"]
        elif event["cat"] == "gpu_memcpy":
            copies[stream][_direction(event["name"])] += event["dur"]
    main = max((s for s in copies if s[0] == base), key=busy.__getitem__, default=None)
    lanes = {}
    for stream, directions in copies.items():
        device, number = stream
        if stream == main:
            lanes[stream] = STREAM
        elif device != base:
            only_copies = directions and not busy[stream]
            lanes[stream] = BACK if only_copies else f"stream of cuda:{device}"
        elif directions:
            lanes[stream] = directions.most_common(1)[0][0]
        else:
            lanes[stream] = f"base stream {number}"
    return lanes


def _stream(event: Mapping[str, Any]) -> tuple[int, int]:
    return event["args"].get("device", 0), event["args"].get("stream", 0)


def _direction(name: str) -> str:
    """Of a copy as the base GPU sees it: to the host or a peer, or from the host."""
    return BACK if "HtoD" in name else OUT


def _phase_at(moment: float, marks: Sequence[tuple[str, float]]) -> str:
    return next((phase for phase, start in reversed(marks) if start <= moment), "")


def tidy(intervals: Sequence[Interval]) -> list[Interval]:
    """Sorted, from 0 ms on, gaps closed that nobody could see: thousands of kernels are a bar."""
    begin = min(one.start for one in intervals if one.kind == FORWARD)
    span = max(one.end for one in intervals) - begin
    joined: dict[tuple[str, str], list[Interval]] = {}
    for one in sorted(intervals, key=lambda one: one.start):
        own = joined.setdefault((one.lane, one.kind), [])
        start, end = one.start - begin, one.end - begin
        if own and start - own[-1].end < span / PIXELS:
            own[-1] = own[-1]._replace(end=max(end, own[-1].end))
        elif one.kind not in ON_TOP or end - start > span / PIXELS:
            own.append(Interval(one.lane, one.kind, start, end))
    return [
        Interval(one.lane, one.kind, round(one.start, 3), round(one.end, 3))
        for own in joined.values()
        for one in own
    ]


def plot_lanes(intervals: Sequence[Interval], title: str, path: Path) -> Path:
    """One row for each lane, one colour for each kind, dashed lines where iterations begin.

    Args:
        intervals: tidy ones.
        title: of the figure.
        path: picture to write; its suffix says which format.
    """
    # The object interface with its own canvas: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lanes = order_lanes({one.lane for one in intervals})
    figure = Figure(figsize=(11, 0.42 * len(lanes) + 2.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind in [*(kind for kind in COLOURS if kind not in ON_TOP), *ON_TOP]:
        height = 0.25 if kind in ON_TOP else 0.8
        for place, lane in enumerate(lanes):
            own = [
                (o.start, o.end - o.start) for o in intervals if (o.lane, o.kind) == (lane, kind)
            ]
            # The edge shows copies that are narrower than a pixel.
            axes.broken_barh(own, (place - height / 2, height), color=COLOURS[kind], linewidth=0.4)
    begins = iteration_starts(intervals)
    for number, begin in enumerate(begins, start=1):
        axes.axvline(begin, color="#444444", linewidth=0.8, linestyle="--")
        axes.annotate(f" iteration {number}", (begin, -0.55), va="bottom", fontsize=8)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.4, -1.1)  # the first lane on top, room for the iterations' numbers
    axes.set_xlim(0, max(one.end for one in intervals))
    axes.set(xlabel="time, ms", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    used = {one.kind for one in intervals}
    patches = [Patch(color=COLOURS[kind], label=kind) for kind in COLOURS if kind in used]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(5, len(patches)), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def order_lanes(lanes: Iterable[str]) -> list[str]:
    """The base device's first, then what others did, by name and number."""
    first = {lane: place for place, lane in enumerate((STREAM, HOST, OUT, BACK))}
    return sorted(lanes, key=lambda lane: (first.get(lane, len(first)), len(lane), lane))


def iteration_starts(intervals: Sequence[Interval]) -> list[float]:
    """Where a forward pass follows a backward pass, on the base device if it was seen."""
    lane = STREAM if any(one.lane == STREAM for one in intervals) else HOST
    passes = sorted(
        (one.start, one.kind)
        for one in intervals
        if one.lane == lane and one.kind in (FORWARD, BACKWARD)
    )
    before = [BACKWARD, *(kind for _, kind in passes)]
    return [
        start
        for (start, kind), previous in zip(passes, before, strict=False)
        if kind == FORWARD and previous == BACKWARD
    ]


def total_ms(intervals: Iterable[Interval], kind: str) -> float:
    """Time of one kind, summed over lanes."""
    return sum(one.end - one.start for one in intervals if one.kind == kind)
