"""Which adapter is fitted where."""

import pytest
import torch

from cola.adapters import build_adapter
from cola.config.choices import AdapterKind
from cola.config.schema import AdapterConfig
from cola.offload.placing import OffloadPlan, spread
from cola.offload.timing import gradient_seconds, relative_speeds
from cola.offload.worker import InlineWorker
from cola.sites import SiteKind, SiteSpec
from cola.user_adapters import SiteAdapter
from tests import tiny

CPU = torch.device("cpu")


def places_of(widths: dict[str, int], num_workers: int) -> list[set[str]]:
    """Sites of each worker, whose linear adapters have so many parameters."""
    config = AdapterConfig(kind=AdapterKind.linear)
    adapters: dict[str, SiteAdapter] = {}
    for name, width in widths.items():
        spec = SiteSpec(name=name, kind=SiteKind.linear, in_features=width, out_features=1)
        adapters[name] = build_adapter(config, spec, seed=0)
    found: dict[int, set[str]] = {}
    for group in tiny.offload_plan(num_workers).place(adapters, CPU, torch.float32):
        found.setdefault(id(group.worker), set()).update(group.adapters)
        group.worker.stop()
    return list(found.values())


def test_a_large_adapter_outweighs_small_ones() -> None:
    assert places_of({"a": 10, "b": 10, "c": 10, "d": 30}, 2) == [{"d"}, {"a", "b", "c"}]


def test_neighbours_go_to_different_places() -> None:
    assert places_of(dict.fromkeys("abcd", 10), 2) == [{"b", "d"}, {"a", "c"}]


def test_sites_of_one_module_stay_together() -> None:
    widths = dict.fromkeys(["0.q", "0.v", "1.q", "1.v"], 10)
    assert places_of(widths, 2) == [{"1.q", "1.v"}, {"0.q", "0.v"}]


def test_the_first_block_steps_alone_and_small_ones_of_a_worker_together() -> None:
    """The next forward pass waits for it."""
    config = AdapterConfig(kind=AdapterKind.linear)
    adapters: dict[str, SiteAdapter] = {}
    for name in ("0.q", "0.v", "1.q", "1.v", "2.q", "2.v"):
        spec = SiteSpec(name=name, kind=SiteKind.linear, in_features=10, out_features=1)
        adapters[name] = build_adapter(config, spec, seed=0)
    groups = tiny.offload_plan(1).place(adapters, CPU, torch.float32)
    assert [set(group.adapters) for group in groups] == [
        {"0.q", "0.v"},
        {"1.q", "1.v", "2.q", "2.v"},
    ]
    assert len({id(group.worker) for group in groups}) == 1
    groups[0].worker.stop()


@pytest.mark.parametrize(
    ("cores", "workers", "num", "threads"),
    [(16, None, 8, 3), (2, None, 1, 2), (1, None, 1, 1),
     (16, 2, 2, 8), (16, 16, 16, 3), (2, 4, 4, 2)],
)  # fmt: skip
def test_a_fit_may_use_more_cores_than_its_share(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int | None, num: int, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    started = []

    def start(name: str, device: torch.device, *, num_threads: int) -> InlineWorker:
        started.append(num_threads)
        return InlineWorker(device)

    monkeypatch.setattr("cola.offload.placing.ThreadWorker", start)
    adapters: dict[str, SiteAdapter] = {
        "q": tiny.filled_adapter(AdapterKind.linear, tiny.site("linear").spec)
    }
    OffloadPlan(devices=(CPU,), workers=workers).place(adapters, CPU, torch.float32)
    assert started == [threads] * num


def test_a_faster_place_gets_more() -> None:
    assert spread([1] * 6, [1.0, 0.5]) == [[1, 2, 4, 5], [0, 3]]
    assert spread([4, 4, 4], [1.0, 0.25]) == [[0, 1, 2], []]


def test_speeds_are_measured_and_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (
        tiny.filled_adapter(kind, tiny.site("linear").spec)
        for kind in (AdapterKind.lowrank, AdapterKind.mlp)
    )
    measured: list[object] = []

    def seconds(adapter: object, device: torch.device, *_: object) -> float:
        measured.append(type(adapter))
        return {"cuda:1": 1.04, "cuda:2": 1.0, "cuda:3": 2.1, "cuda:4": 90.0}[str(device)]

    monkeypatch.setattr("cola.offload.timing.gradient_seconds", seconds)
    devices = [torch.device("cuda", index) for index in (1, 2, 3, 4)]
    found = relative_speeds([small, large], devices, torch.float64, 10)
    assert found == [1.0, 1.0, 0.5, 0.25], "equal GPUs are equal, and none is left out"
    assert measured == [type(large)] * 4
    assert relative_speeds([small], devices[:1], torch.float64, 10) == [1.0]
    convolution = tiny.filled_adapter(AdapterKind.lowrank, tiny.site("conv2d").spec)
    assert relative_speeds([convolution], devices, torch.float64, 10) == [1.0] * 4
    assert len(measured) == 4, "nothing to compare"


def test_measuring_draws_no_random_numbers() -> None:
    adapter = tiny.filled_adapter(AdapterKind.mlp, tiny.site("linear").spec)
    before = torch.get_rng_state()
    assert gradient_seconds(adapter, CPU, torch.float32, 4000) > 0
    assert torch.equal(torch.get_rng_state(), before)
