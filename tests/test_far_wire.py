"""Which streams a copy to another GPU is issued with, with streams that only take notes."""

from typing import Any

import pytest
import torch

from cola.offload import departures
from cola.offload.transfer import Transfer
from cola.packing import pack
from cola.site_calls import SiteRun
from cola.sites import SiteKind, SiteSpec

SPEC = SiteSpec(name="q", kind=SiteKind.linear, in_features=4, out_features=4)


class Stream:
    """A stream of one GPU."""

    def __init__(self, log: list[str], gpu: int, name: str) -> None:
        self.log, self.gpu, self.name = log, gpu, name

    def wait_event(self, event: "Event") -> None:
        self.log.append(f"{self.name} waits for {event.name}")


class Event:
    """Named by the stream that recorded it last."""

    name = "a fit"

    def __init__(self, **_: bool) -> None:
        pass

    def record(self, stream: Stream) -> None:
        self.name = stream.name


class FarTransfer(Transfer):
    """To a GPU that is not there: what lands has a shape and nothing else."""

    @property
    def ends_on_gpu(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    current = {0: Stream(log, 0, "base"), 1: Stream(log, 1, "default of cuda:1")}
    names = iter(["out", "landing", "returning"])

    def index(device: torch.device) -> int:
        return int(device.type == "meta")

    def make(device: torch.device) -> Stream:
        return Stream(log, index(device), next(names))

    def set_stream(stream: Stream) -> None:
        current[stream.gpu] = stream
        log.append(f"on {stream.name}")

    copy = torch.Tensor.copy_

    def copy_to(target: torch.Tensor, source: torch.Tensor, **settings: bool) -> torch.Tensor:
        if target.device.type == "meta":
            log.append(f"copy with {current[0].name} and {current[1].name}")
        return copy(target, source, **settings)

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[index(device)])
    monkeypatch.setattr(torch.Tensor, "copy_", copy_to)
    return log


def send(wire: Transfer, *tensors: torch.Tensor) -> int:
    runs = [(SPEC, SiteRun("q", tensor, tensor.dtype)) for tensor in tensors]
    return len(wire.send_distinct(runs))


def wire_of(log: list[str]) -> Any:
    wire = FarTransfer(torch.device("cuda:0"), torch.device("meta"))
    wire.begin_step()
    log.clear()
    return wire


def test_no_copy_is_issued_on_a_default_stream_of_the_other_gpu(log: list[str]) -> None:
    wire = wire_of(log)
    assert send(wire, *pack([torch.rand(5, 4), torch.rand(6, 4)])) == 2
    assert log == [
        "out waits for base", "on landing", "on out", "copy with out and landing", "on base"
    ]  # fmt: skip
    log.clear()
    wire.follow(Event())
    assert log == ["base waits for a fit", "returning waits for a fit", "on returning", "on base"]
    log.clear()
    wire.follow(None)  # republished by this thread: what is fetched still has its own stream
    assert log == ["on returning", "on base"]


def test_base_waits_for_copies_beyond_the_bound_and_at_the_end(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(departures, "LEAVING_BYTES", 200)
    wire = wire_of(log)
    for num_rows in (5, 5, 5):  # 80 bytes each
        send(wire, torch.rand(num_rows, 4))
    assert log.count("base waits for out") == 1
    log.clear()
    wire.begin_step()
    assert log == ["base waits for out"] * 2


def test_tensors_that_lie_apart_are_copied_one_by_one(log: list[str]) -> None:
    wire = wire_of(log)
    send(wire, torch.rand(5, 4), torch.rand(6, 4))
    assert log.count("copy with out and landing") == 2
    assert log.count("out waits for base") == 1
