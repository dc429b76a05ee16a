"""Which adapter is fitted where, and by what that is decided."""

import pytest
import torch

from cola.config.choices import AdapterKind
from cola.offload import placing, timing
from cola.offload.placing import OffloadPlan
from cola.offload.timing import FitClock
from cola.user_adapters import SiteAdapter
from tests import tiny, users

CPU = torch.device("cpu")
F64 = torch.float64
WEIGHT = torch.zeros(1, dtype=F64)


def places_of(plan: OffloadPlan, adapters: dict[str, SiteAdapter]) -> list[set[str]]:
    """Sites of each worker."""
    found: dict[str, set[str]] = {}
    for group in plan.place(adapters, WEIGHT, F64):
        found.setdefault(str(id(group.worker)), set()).update(group.adapters)
        group.worker.stop()
    return list(found.values())


def adapters_like(*names: str) -> dict[str, SiteAdapter]:
    spec = tiny.site("linear").spec
    return {name: tiny.filled_adapter(AdapterKind.linear, spec) for name in names}


def test_work_is_spread_by_what_fits_take(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapters_like("a", "b", "c", "d")
    seconds = dict(zip(map(id, adapters.values()), (1.0, 1.0, 1.0, 3.0), strict=True))
    monkeypatch.setattr(FitClock, "seconds", lambda self, adapter: seconds[id(adapter)])
    assert places_of(tiny.offload_plan(2), adapters) == [{"d"}, {"a", "b", "c"}]


def test_nothing_is_measured_where_there_is_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "FitClock", None)
    assert places_of(tiny.offload_plan(1), adapters_like("a", "b")) == [{"a", "b"}]


def test_a_shape_is_measured_once_and_draws_no_random_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = []
    original = timing.gradient_seconds

    def note(adapter: SiteAdapter, *args: object, **settings: object) -> float:
        measured.append(adapter)
        return original(adapter, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(timing, "gradient_seconds", note)
    adapters = adapters_like("a", "b", "c")
    before = torch.get_rng_state()
    places_of(tiny.offload_plan(2), adapters)
    assert len(measured) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_users_cost_what_their_kinds_take(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def seconds(adapter: SiteAdapter, *args: object, **settings: object) -> float:
        asked.append((type(adapter).__name__, args[2]))
        return 1.0

    monkeypatch.setattr(timing, "gradient_seconds", seconds)
    base = tiny.net()
    roster = users.roster(users.settings("lowrank:3", "linear", "mlp"))
    owned = users.filled(base, roster)
    clock = FitClock(CPU, F64, F64, 30)
    site = next(iter(owned))
    assert clock.seconds(owned[site]) == 3.0
    assert sorted(asked) == [("LinearAdapter", 10), ("LowRankAdapter", 10), ("MLPAdapter", 10)]


@pytest.mark.parametrize("kind", AdapterKind)
def test_measured_seconds_are_positive(kind: AdapterKind) -> None:
    clock = FitClock(CPU, torch.float32, torch.float32, 4000)
    for site in ("linear", "conv1d", "conv2d"):
        adapter = tiny.filled_adapter(kind, tiny.site(site).spec)
        assert clock.seconds(adapter) > 0
