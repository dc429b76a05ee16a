"""Which adapter is fitted where."""

import torch

from cola.adapters import build_adapter
from cola.config.choices import AdapterKind
from cola.config.schema import AdapterConfig
from cola.offload.timing import gradient_seconds
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


def test_measuring_draws_no_random_numbers() -> None:
    adapter = tiny.filled_adapter(AdapterKind.mlp, tiny.site("linear").spec)
    before = torch.get_rng_state()
    assert gradient_seconds(adapter, CPU, torch.float32, 4000) > 0
    assert torch.equal(torch.get_rng_state(), before)
