"""What copies under way read stays, within bounds and in order."""

import weakref
from typing import Any

import pytest
import torch

from cola.offload import departures
from cola.offload.departures import Departures


class Stream:
    """Notes what it waits for."""

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


@pytest.fixture(autouse=True)
def _small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "LEAVING_BYTES", 100)


def leave(held: Departures, stream: Any, event: Any, *sizes: int) -> "list[weakref.ref[Any]]":
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    held.add(tensors, event, stream)
    return [weakref.ref(tensor) for tensor in tensors]


def test_the_oldest_are_waited_for_before_their_memory_is_free() -> None:
    held, stream = Departures(), Stream()
    first = leave(held, stream, "first", 30, 20)
    second = leave(held, stream, "second", 50)
    assert (stream.waited, held.num_bytes) == ([], 100)
    assert all(reference() is not None for reference in [*first, *second])
    third = leave(held, stream, "third", 1)
    assert (stream.waited, held.num_bytes) == (["first"], 51)
    assert all(reference() is None for reference in first)
    assert all(reference() is not None for reference in [*second, *third])


def test_what_is_larger_than_the_bound_is_held_alone() -> None:
    held, stream = Departures(), Stream()
    for event in range(3):
        leave(held, stream, event, 500)
        assert held.num_bytes == 500
    assert stream.waited == [0, 1]


def test_parts_of_one_memory_are_waited_for_together() -> None:
    held, stream = Departures(), Stream()
    leave(held, stream, "older", 30)
    memory = torch.zeros(120, dtype=torch.uint8)
    whole = weakref.ref(memory)
    held.add([memory[:60]], "first half", stream)  # type: ignore[arg-type]
    held.add([memory[60:]], "second half", stream)  # type: ignore[arg-type]
    del memory
    assert (stream.waited, held.num_bytes) == (["older"], 120)
    leave(held, stream, "newer", 10)
    assert (stream.waited, held.num_bytes) == (["older", "second half"], 10)
    assert whole() is None


def test_memory_in_part_elsewhere_is_another() -> None:
    held, stream = Departures(), Stream()
    memory = torch.zeros(120, dtype=torch.uint8)
    held.add([memory[:60]], "first", stream)  # type: ignore[arg-type]
    held.add([memory[60:], torch.zeros(50)], "second", stream)  # type: ignore[arg-type]
    assert stream.waited == ["first"]


def test_a_step_ends_with_nothing_held() -> None:
    held, stream = Departures(), Stream()
    for event in range(3):
        leave(held, stream, event, 10)
    held.let_go(stream)
    assert (stream.waited, held.num_bytes) == ([0, 1, 2], 0)
