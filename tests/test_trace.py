"""The picture of an iteration: a profiler's events on lanes, and a whole recording on the CPU."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.fixture
def lanes(scripts: None) -> ModuleType:
    return importlib.import_module("trace_lanes")


@pytest.fixture
def script(scripts: None) -> ModuleType:
    return importlib.import_module("trace_iteration")


# Events of a GPU


def gpu(
    category: str, name: str, start: float, length: float, *, device: int = 0, **args: int
) -> dict[str, Any]:
    return {
        "ph": "X", "cat": category, "name": name, "ts": start, "dur": length,
        "args": {"device": device, **args},
    }  # fmt: skip


def launch(start: float, correlation: int, category: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": "launch", "ts": start, "dur": 2.0,
            "args": {"correlation": correlation}}  # fmt: skip


EVENTS = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1000.0, "dur": 9.0, "args": {}},
    launch(1000.0, 1),
    launch(1100.0, 2, "cuda_driver"),
    launch(3000.0, 3),
    gpu("kernel", "gemm", 1500.0, 400.0, stream=7, correlation=1),
    gpu("kernel", "gemm", 3500.0, 300.0, stream=7, correlation=2),  # late, but of the forward pass
    gpu("kernel", "gemm", 4000.0, 500.0, stream=7, correlation=3),
    gpu("gpu_memset", "Memset (Device)", 4500.0, 1.0, stream=7),  # nobody knows who launched it
    gpu("kernel", "index_select", 2000.0, 50.0, stream=20, correlation=8),
    gpu("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 2050.0, 200.0, stream=20),
    gpu("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 900.0, 20.0, stream=24),
    gpu("kernel", "nccl", 900.0, 30.0, stream=31),
    gpu("kernel", "adamw", 4600.0, 60.0, device=1, stream=13),
    gpu("gpu_memcpy", "Memcpy PtoP (Device -> Device)", 4700.0, 10.0, device=1, stream=7),
]
MARKS = [("forward", 10.9), ("backward", 12.5), ("", 15.0)]  # ms; events are 10 ms behind


def test_streams_become_lanes_by_what_they_do(lanes):
    found = lanes.device_intervals(EVENTS, MARKS, 10.0, base=0)
    assert [(lane, kind, round(a, 3), round(b, 3)) for lane, kind, a, b in found] == [
        (lanes.STREAM, "forward", 11.5, 11.9),
        (lanes.STREAM, "forward", 13.5, 13.8),
        (lanes.STREAM, "backward", 14.0, 14.5),
        (lanes.STREAM, "backward", 14.5, 14.501),
        (lanes.OUT, lanes.OUT, 12.0, 12.05),
        (lanes.OUT, lanes.OUT, 12.05, 12.25),
        (lanes.BACK, lanes.BACK, 10.9, 10.92),
        ("base stream 31", lanes.OTHER, 10.9, 10.93),
        ("stream of cuda:1", lanes.FIT, 14.6, 14.66),
        (lanes.BACK, lanes.BACK, 14.7, 14.71),
    ]


def test_copies_to_another_gpu_leave_the_base(lanes):
    events = [
        gpu("kernel", "gemm", 10.0, 90.0, stream=7),
        gpu("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 100.0, 1.0, stream=7),
        gpu("gpu_memcpy", "Memcpy PtoP (Device -> Device)", 101.0, 5.0, stream=20),
    ]
    found = lanes.device_intervals(events, [("forward", 0.0)], 0.0, base=0)
    assert [one.lane for one in found] == [lanes.STREAM, lanes.STREAM, lanes.OUT]


def test_without_events_there_are_no_lanes(lanes):
    assert lanes.device_intervals([], MARKS, 0.0, base=0) == []
    assert lanes.device_intervals([EVENTS[0]], MARKS, 0.0, base=0) == []


def test_a_marker_of_the_host_is_in_the_exported_events(script):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function(script.CLOCK):
            pass
        torch.ones(2) + 1
    events = script.chrome_events(profiler)
    (marker,) = [event for event in events if event.get("name") == script.CLOCK]
    (added,) = [event for event in events if event.get("name") == "aten::add"]
    assert marker["ts"] <= added["ts"]


# Intervals


def test_gaps_that_nobody_sees_are_closed(lanes):
    bar = lanes.Interval
    found = lanes.tidy(
        [
            bar(lanes.HOST, "forward", 100.0, 150.0),
            bar(lanes.STREAM, "forward", 101.0, 110.0),
            bar(lanes.STREAM, "backward", 140.0, 200.0),
            bar(lanes.STREAM, "forward", 110.01, 120.0),
            bar(lanes.STREAM, "forward", 121.0, 122.0),
            bar(lanes.HOST, lanes.WAIT, 101.0, 101.01),  # too short to be seen
            bar(lanes.HOST, lanes.WAIT, 105.0, 107.0),
        ]
    )
    assert sorted(found) == sorted(
        [
            bar(lanes.HOST, "forward", 0.0, 50.0),
            bar(lanes.STREAM, "forward", 1.0, 20.0),
            bar(lanes.STREAM, "forward", 21.0, 22.0),
            bar(lanes.STREAM, "backward", 40.0, 100.0),
            bar(lanes.HOST, lanes.WAIT, 5.0, 7.0),
        ]
    )


def test_an_iteration_starts_where_a_forward_pass_follows_a_backward_pass(lanes):
    kinds = ["forward", "forward", "backward", "backward", "forward", "backward"]
    own = [lanes.Interval(lanes.STREAM, kind, i, i + 1) for i, kind in enumerate(kinds)]
    host = [lanes.Interval(lanes.HOST, "forward", 0.5, 1.0)]
    assert lanes.iteration_starts([*reversed(own), *host]) == [0, 4]
    assert lanes.iteration_starts(host) == [0.5]


def test_lanes_stand_in_order(lanes):
    mixed = {"offload-10", lanes.BACK, "offload-2", "base stream 31", lanes.HOST, lanes.STREAM}
    assert lanes.order_lanes(mixed) == [
        lanes.STREAM, lanes.HOST, lanes.BACK, "offload-2", "offload-10", "base stream 31",
    ]  # fmt: skip


def test_every_lane_is_drawn(lanes, tmp_path):
    found = lanes.tidy(lanes.device_intervals(EVENTS, MARKS, 10.0, base=0))
    path = lanes.plot_lanes(found, "by hand", tmp_path / "figures" / "trace.png")
    assert path.read_bytes()[:4] == PNG


# A recording


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trace_iteration.py", *arguments])
    result: int = script.main()
    return result


SMALL = ("model=tiny-llama", "task.max_length=8", "device=cpu", "--batch-size", "2",
         "--warmup", "1")  # fmt: skip


def test_two_iterations_on_the_cpu(script, lanes, monkeypatch, tmp_path, capsys):
    picture, data = tmp_path / "trace.png", tmp_path / "trace.json"
    arguments = (*SMALL, "offload.workers=2", "--out", str(picture), "--json", str(data))
    assert call(script, monkeypatch, *arguments) == 0
    assert picture.read_bytes()[:4] == PNG
    assert "waited" in capsys.readouterr().out
    trace = json.loads(data.read_text(encoding="utf-8"))
    found = [lanes.Interval(*one) for one in trace["intervals"]]
    workers = {one.lane for one in found} - {lanes.HOST}
    assert workers == {"offload-0", "offload-1"}
    assert {one.kind for one in found if one.lane in workers} >= {lanes.COUNT, lanes.FIT}
    first, second = lanes.iteration_starts(found)
    assert first == 0.0 < second
    for begin, end in ((first, second), (second, float("inf"))):
        own = [one for one in found if begin <= one.start < end and one.lane == lanes.HOST]
        assert [one.kind for one in own if one.kind != lanes.WAIT] == ["forward", "backward"]
    picture.unlink()
    assert call(script, monkeypatch, "--from-json", str(data), "--out", str(picture)) == 0
    assert picture.exists()


def test_without_workers_there_is_nothing_to_draw(script, monkeypatch, capsys):
    assert call(script, monkeypatch, *SMALL, "offload=none") == 2
    message = "offload=none: there are no workers to draw; use offload=cpu or gpu"
    assert message in capsys.readouterr().err


def test_at_least_one_iteration_is_drawn(script, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(script, monkeypatch, *SMALL, "--iterations", "0")
    assert "whole numbers >= 1" in capsys.readouterr().err
