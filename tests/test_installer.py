"""When parameters are brought to the sites, with a source that says what is ready."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cola.installer import Installer

CPU = torch.device("cpu")


class Source:
    """Fits that have ended."""

    def __init__(self) -> None:
        self.ended: set[tuple[str, int]] = set()

    def ready(self, sites: Iterable[str], version: int) -> list[str]:
        return [site for site in sites if (site, version) in self.ended]

    def wait(self, sites: Iterable[str], version: int) -> dict[str, Mapping[str, Tensor]]:
        return {site: {"weight": torch.full((1,), version)} for site in sites}


class Placed:
    """Remembers what was installed, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def install_all(self, published: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.log += [(site, int(own["weight"])) for site, own in published.items()]


def build() -> tuple[Installer, Source, Any]:
    source, placed = Source(), Placed()
    return Installer(["a", "b", "c"], placed, source, CPU), source, placed  # type: ignore[arg-type]


def test_a_site_waits_only_for_itself() -> None:
    installer, _, placed = build()
    installer.begin(1)
    installer.require(["b"])
    installer.require(["b"])
    assert placed.log == [("b", 1)]
    installer.require(["b", "c"])
    assert placed.log == [("b", 1), ("c", 1)]


def test_what_is_ready_comes_back_when_the_backward_pass_has_left_it() -> None:
    installer, source, placed = build()
    installer.begin(0, following=1)
    installer.release(["c"])
    assert placed.log == []
    source.ended |= {("c", 1), ("a", 1)}  # a is not free yet
    installer.release(["b"])
    assert placed.log == [("c", 1)]
    source.ended.add(("b", 1))
    installer.release(["a"])
    assert placed.log == [("c", 1), ("b", 1), ("a", 1)]
    installer.begin(1)
    for site in "abc":
        installer.require([site])
    assert len(placed.log) == 3


def test_nothing_comes_back_early_inside_an_interval() -> None:
    installer, source, placed = build()
    installer.begin(0)
    source.ended |= {("c", 0), ("c", 1)}
    installer.release(["c"])
    assert placed.log == []


def test_what_was_left_in_an_earlier_pass_is_not_free_in_this_one() -> None:
    installer, source, placed = build()
    installer.begin(0, following=1)
    installer.release(["c"])
    installer.begin(1, following=2)
    source.ended.add(("c", 2))
    installer.release([])
    assert placed.log == []
