"""The offload side: fitters, fleets and workers, alone and under a learner."""

import copy
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola.adaptation_data import AdaptationData
from cola.adapters import Adapter
from cola.checkpoint import load_state, save_state
from cola.config.choices import AdapterKind, MergeMode, Objective, Pristine
from cola.config.schema import OptimizerConfig
from cola.errors import OffloadError
from cola.gradient_learner import GradientLearner
from cola.interfaces import Adaptation
from cola.meters import count_bytes
from cola.objectives import task_loss
from cola.offload.fit import Fit
from cola.offload.fitter import AdapterFitter
from cola.offload.fleet import Fleet
from cola.offload.slot import Berth, Slot
from cola.offload.transfer import Transfer
from cola.offload.worker import MAX_PENDING, InlineWorker, ThreadWorker, Worker
from cola.site_calls import SiteRun
from cola.task_data import Batch
from tests import tiny
from tests.tolerances import EXACT, FLOAT32

CPU = torch.device("cpu")
LOWRANK = AdapterKind.lowrank
PLAIN_SGD = OptimizerConfig(
    **{**vars(tiny.optimizer("sgd")), "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
)

by_offload = pytest.mark.parametrize("offload", ["none", "cpu"])
by_interval = pytest.mark.parametrize("interval", [1, 2])
FleetBuilder = Callable[..., Fleet]
Deliveries = Sequence[tuple[str, AdaptationData]]


class TwinLayers(nn.Module):
    """Eight layers of one shape, each a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(8)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> tiny.Output:
        return tiny.Output(self.layers(features).mean(dim=1)[:, :3])


@pytest.fixture
def build_fleet() -> Iterator[FleetBuilder]:
    """Fleets of two linear sites, `first` and `second`, each with a worker of its own, or one."""
    built: list[Fleet] = []

    def build(
        offload: str, optimizer: OptimizerConfig = PLAIN_SGD, *, num_workers: int = 2
    ) -> Fleet:
        adapters = {}
        for seed, name in enumerate(("first", "second")):
            spec = dataclasses.replace(tiny.site("linear").spec, name=name)
            adapters[name] = tiny.filled_adapter(LOWRANK, spec, seed=seed)
        workers: list[Worker] = [InlineWorker(CPU)]
        groups = [adapters]
        if offload == "cpu":
            workers = [
                ThreadWorker(f"test-{index}", CPU, num_threads=1) for index in range(num_workers)
            ]
            if num_workers == 2:
                groups = [{name: adapter} for name, adapter in adapters.items()]
        transfer = Transfer(CPU, CPU)
        fleet = Fleet(
            [
                Berth(
                    fitter=AdapterFitter(group, optimizer, scale=tiny.SCALE),
                    worker=worker,
                    transfer=transfer,
                    blocks=[[name] for name in group],
                )
                for group, worker in zip(groups, workers, strict=True)
            ],
            publish=snapshots,
            optimizer=optimizer,
            overlaps=offload == "cpu",
        )
        built.append(fleet)
        return fleet

    yield build
    for fleet in built:
        fleet.stop()


def snapshots(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, Tensor]]:
    return {
        site: {name: p.detach().clone() for name, p in adapter.named_parameters()}
        for site, adapter in adapters.items()
    }


def data(value: float | None = None) -> AdaptationData:
    """Rows for a linear site; with a value, as one entry of the hidden gradient."""
    x = tiny.site("linear").hidden_input
    gradient = torch.ones(x.shape[0], 4, dtype=torch.float64)
    if value is not None:
        gradient[2, 1] = value
    return AdaptationData(hidden_input=x, hidden_gradient=gradient)


def put(fleet: Fleet, site: str, value: AdaptationData) -> None:
    """One call of a site, forward and backward."""
    x = value.hidden_input
    (sent,) = fleet.send_inputs([SiteRun(site, x, x.dtype)])
    fleet.put(site, sent, value.hidden_gradient, None, None)


def fit(number: int = 1) -> Fit:
    return Fit(number=number, learning_rate=0.1, gradient_scale=1.0)


def adapters(fleet: Fleet) -> dict[str, Tensor]:
    with fleet.drained() as owned:
        return {site: tiny.flat(adapter) for site, adapter in owned.items()}


# Versions and order


@pytest.mark.parametrize(
    ("offload", "clip", "waits"),
    [("cpu", "none", False), ("cpu", "adapter", False), ("cpu", "global", True)]
    + [("none", clip, True) for clip in ("none", "adapter", "global")],
)
def test_a_fit_starts_when_its_site_closes_unless_a_barrier_bars_it(
    build_fleet: FleetBuilder, offload: str, clip: str, waits: bool
) -> None:
    fleet = build_fleet(
        offload, dataclasses.replace(PLAIN_SGD, clip=tiny.optimizer("sgd", clip).clip)
    )
    before = fleet.wait(["first"], 0)["first"]
    fleet.begin_step(fit())
    put(fleet, "first", data())
    fleet.close("first")
    early = fleet.wait(["first"], 0 if waits else 1)["first"]
    assert torch.equal(early["lora_b"], before["lora_b"]) == waits
    fleet.finish()
    assert not torch.equal(fleet.wait(["first"], 1)["first"]["lora_b"], before["lora_b"])


@by_offload
def test_no_fit_starts_inside_an_interval(build_fleet: FleetBuilder, offload: str) -> None:
    fleet = build_fleet(offload)
    before = adapters(fleet)
    fleet.begin_step(None)
    put(fleet, "first", data())
    fleet.close("first")
    fleet.drain()
    assert torch.equal(fleet.wait(["first"], 0)["first"]["lora_a"].flatten(), before["first"][:10])
    assert torch.equal(adapters(fleet)["first"], before["first"])


@by_offload
def test_a_site_without_data_does_not_step(build_fleet: FleetBuilder, offload: str) -> None:
    decaying = dataclasses.replace(tiny.optimizer("adamw"), weight_decay=0.5)
    fleet = build_fleet(offload, decaying)
    before = adapters(fleet)
    for number in (1, 2):
        fleet.begin_step(fit(number))
        put(fleet, "first", data())
        fleet.close("first")
        fleet.finish()
    after = adapters(fleet)
    assert not torch.equal(after["first"], before["first"])
    assert torch.equal(after["second"], before["second"])
    assert torch.equal(
        fleet.wait(["second"], 2)["second"]["lora_a"].flatten(), before["second"][:10]
    )


@by_offload
def test_zero_gradient_leaves_weights_unchanged_under_sgd(
    build_fleet: FleetBuilder, offload: str
) -> None:
    fleet = build_fleet(offload, dataclasses.replace(tiny.optimizer("sgd"), weight_decay=0.0))
    before = adapters(fleet)
    zero = AdaptationData(
        hidden_input=data().hidden_input, hidden_gradient=torch.zeros_like(data().hidden_gradient)
    )
    for number in (1, 2):
        fleet.begin_step(fit(number))
        put(fleet, "first", zero)
        fleet.close("first")
        fleet.finish()
    assert torch.equal(adapters(fleet)["first"], before["first"])


@pytest.mark.parametrize(("num_workers", "sites"), [(2, ["first"]), (1, ["first", "second"])])
def test_what_waits_for_a_worker_is_bounded(
    build_fleet: FleetBuilder,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    sites: Sequence[str],
) -> None:
    """Batches of one site, or sites of one worker."""
    fleet = build_fleet("cpu", num_workers=num_workers)
    done, under_way = [], []
    accumulate = AdapterFitter.accumulate

    def slowly(fitter: AdapterFitter, batch: Deliveries) -> None:
        time.sleep(0.002)
        accumulate(fitter, batch)
        done.append(len(batch))

    monkeypatch.setattr(AdapterFitter, "accumulate", slowly)
    fleet.begin_step(None)
    for num_sent in range(1, 16):
        put(fleet, sites[num_sent % len(sites)], data())
        under_way.append(num_sent - len(done))
    assert max(under_way) <= MAX_PENDING
    fleet.drain()
    assert len(done) == 15
    peak = fleet.held_bytes()["cpu"]["staging"]
    assert data().num_bytes <= peak <= (MAX_PENDING + 1) * data().num_bytes


def test_what_waits_for_a_worker_does_not_grow_with_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Adapters so large that each steps alone, all on one worker that is slower than the base."""
    monkeypatch.setattr("cola.offload.placing.STEPPED_TOGETHER", 0)
    base = tiny.net()
    adapters = tiny.filled_adapters(base, AdapterKind.linear)
    learner = tiny.gradient_learner(base, adapters, offload="cpu", num_workers=1)
    sent, counted, under_way = [], [], []
    accumulate, submit = AdapterFitter.accumulate, Slot._hand_over

    def slowly(fitter: AdapterFitter, batch: Deliveries) -> None:
        time.sleep(0.005)
        accumulate(fitter, batch)
        counted.append(batch)

    def hand_over(slot: Slot) -> None:
        before = len(slot._pending)
        submit(slot)
        sent.extend(slot._pending[before:])
        under_way.append(len(sent) - len(counted))

    monkeypatch.setattr(AdapterFitter, "accumulate", slowly)
    monkeypatch.setattr(Slot, "_hand_over", hand_over)
    for number, batch in enumerate(tiny.batches(base, 3), start=1):
        tiny.adapt(learner, batch, number)
    learner.close()
    assert len(sent) > 3 * MAX_PENDING
    assert max(under_way) == MAX_PENDING


@pytest.mark.parametrize("ask", ["state", "evaluation", "export"])
def test_everything_under_way_ends_before_a_learner_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    monkeypatch.setattr("cola.offload.worker.MAX_PENDING", 10)  # the base model need not wait
    base = tiny.net()
    learner = tiny.gradient_learner(base, tiny.filled_adapters(base, LOWRANK), offload="cpu")
    done, may_go, accumulate = [], threading.Event(), AdapterFitter.accumulate

    def hold(fitter: AdapterFitter, batch: Deliveries) -> None:
        may_go.wait()
        accumulate(fitter, batch)
        done.append(batch)

    monkeypatch.setattr(AdapterFitter, "accumulate", hold)
    (batch,) = tiny.batches(base, 1)
    learner.record(batch, None)
    threading.Timer(0.05, may_go.set).start()
    if ask == "evaluation":
        tiny.logits(learner, batch)
    else:
        assert learner.state_dict() if ask == "state" else learner.export()
    assert len(done) == 6
    learner.close()


def test_bytes_on_the_wire_are_counted_where_there_is_one(build_fleet: FleetBuilder) -> None:
    sent = {}
    for offload in ("none", "cpu"):
        fleet = build_fleet(offload)
        fleet.begin_step(None)
        for _ in range(3):
            put(fleet, "first", data())
        fleet.drain()
        sent[offload] = fleet.wire_bytes(returned_bytes=100)
    assert sent == {"none": 0, "cpu": 3 * data().num_bytes + 100}


# Errors


def break_site(monkeypatch: pytest.MonkeyPatch, method: str, site: str) -> None:
    working = getattr(AdapterFitter, method)

    def broken(fitter: AdapterFitter, *args: Any) -> object:
        found = fitter.adapters if method == "step" else dict(args[0])
        if site in found:
            raise ValueError("out of luck")
        return working(fitter, *args)

    monkeypatch.setattr(AdapterFitter, method, broken)


def fitting_fails(site: str) -> object:
    return pytest.raises(
        OffloadError,
        match=rf"(?s)fitting site '{site}' failed:\nTraceback.*ValueError: out of luck",
    )


def test_an_error_of_a_worker_surfaces_in_the_next_wait(
    build_fleet: FleetBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = build_fleet("cpu")
    break_site(monkeypatch, "step", "first")
    fleet.begin_step(fit())
    for site in ("first", "second"):
        put(fleet, site, data())
        fleet.close(site)
    with fitting_fails("first"):
        fleet.wait(["first"], 1)
    assert fleet.wait(["second"], 1)


def test_an_error_of_a_worker_surfaces_in_put_before_memory_fills(
    build_fleet: FleetBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = build_fleet("cpu")
    break_site(monkeypatch, "accumulate", "first")
    fleet.begin_step(None)
    for _ in range(MAX_PENDING):
        put(fleet, "first", data())
    with fitting_fails("first"):
        put(fleet, "first", data())


@pytest.mark.parametrize("method", ["accumulate", "step"])
def test_an_error_of_a_worker_surfaces_in_every_drain(
    build_fleet: FleetBuilder, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    fleet = build_fleet("cpu")
    break_site(monkeypatch, method, "second")
    fleet.begin_step(fit())
    put(fleet, "second", data())
    fleet.close("second")
    for _ in range(2):
        with fitting_fails("second"):
            fleet.drain()


def test_an_adapter_is_not_stepped_on_half_of_its_data(
    build_fleet: FleetBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = build_fleet("cpu")
    with fleet.drained() as owned:
        adapter = owned["first"]
    before = tiny.flat(adapter)
    fleet.begin_step(None)
    put(fleet, "first", data())
    fleet.drain()
    break_site(monkeypatch, "accumulate", "first")
    fleet.begin_step(fit())
    put(fleet, "first", data())
    fleet.close("first")
    with fitting_fails("first"):
        fleet.wait(["first"], 1)
    monkeypatch.undo()
    fleet.begin_step(fit(2))
    put(fleet, "first", data())
    fleet.close("first")
    with fitting_fails("first"):  # nor by a later fit
        fleet.wait(["first"], 2)
    assert torch.equal(tiny.flat(adapter), before)


def test_an_error_behind_the_barrier_of_a_global_clip_surfaces(
    build_fleet: FleetBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = build_fleet("cpu", tiny.optimizer("sgd", "global"))
    break_site(monkeypatch, "accumulate", "second")
    fleet.begin_step(fit())
    put(fleet, "second", data())
    fleet.close("second")
    with fitting_fails("second"):
        fleet.finish()


def test_an_error_on_the_base_device_surfaces_at_once(
    build_fleet: FleetBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = build_fleet("none")
    break_site(monkeypatch, "accumulate", "first")
    fleet.begin_step(None)
    with fitting_fails("first"):
        put(fleet, "first", data())


@by_offload
def test_an_error_reaches_the_caller_of_the_learner(
    monkeypatch: pytest.MonkeyPatch, offload: str
) -> None:
    base = tiny.net()
    start = tiny.filled_adapters(base, LOWRANK)
    learner = tiny.gradient_learner(base, start, offload=offload)
    break_site(monkeypatch, "accumulate", "twist")
    with fitting_fails("twist"):
        tiny.train(learner, tiny.batches(base, 2))
    learner.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", ["none", "adapter", "global"])
@by_offload
def test_a_gradient_that_is_not_finite_is_named_and_its_adapter_kept(
    build_fleet: FleetBuilder, offload: str, clip: str, value: float
) -> None:
    before, after = spoil_second(build_fleet, offload, clip, value)
    assert torch.equal(after["second"], before["second"])


@pytest.mark.parametrize("clip", ["none", "adapter", "global"])
@by_offload
def test_a_gradient_that_is_not_finite_does_not_spoil_other_sites(
    build_fleet: FleetBuilder, offload: str, clip: str
) -> None:
    _, after = spoil_second(build_fleet, offload, clip, float("nan"))
    assert after["first"].isfinite().all()


def spoil_second(
    build_fleet: FleetBuilder, offload: str, clip: str, value: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before and after an adaptation in which one entry of `second` is not finite."""
    fleet = build_fleet(offload, tiny.optimizer("adamw", clip))
    with fleet.drained() as owned:
        pass
    before = {site: tiny.flat(adapter) for site, adapter in owned.items()}
    fleet.begin_step(fit(7))
    for site in ("second", "first"):
        put(fleet, site, data(value if site == "second" else None))
        fleet.close(site)
    with pytest.raises(
        OffloadError, match=r"adaptation 7: the hidden gradient of site 'second' is not finite.*lr"
    ):
        settle(fleet)
    return before, {site: tiny.flat(adapter) for site, adapter in owned.items()}


def settle(fleet: Fleet) -> None:
    fleet.finish()
    fleet.drain()


# Clipping, through the learner


@pytest.mark.parametrize("kind", list(AdapterKind), ids=lambda kind: kind.name)
@by_interval
@by_offload
def test_clip_per_adapter_equals_torch_clip_on_each(
    offload: str, interval: int, kind: AdapterKind
) -> None:
    base = tiny.net()
    start, stream = tiny.filled_adapters(base, kind), tiny.batches(base, 5)
    config = tiny.optimizer("sgd", "adapter")
    wanted = tiny.train_clipping_each(
        copy.deepcopy(base), start, stream, optimizer_config=config, interval=interval
    )
    check_clip(base, start, stream, wanted, config, offload, interval)


@by_interval
@by_offload
@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
def test_clip_by_global_norm_equals_torch_clip_on_all(
    mode: MergeMode, offload: str, interval: int
) -> None:
    base = tiny.net()
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 5)
    config = tiny.optimizer("sgd", "global")
    oracle = tiny.oracle_learner(copy.deepcopy(base), start, optimizer_config=config)
    tiny.train(oracle, stream, interval=interval)
    check_clip(base, start, stream, oracle.export(), config, offload, interval, mode)


def check_clip(
    base: nn.Module,
    start: dict[str, Adapter],
    stream: list[Batch],
    wanted: dict[str, Adapter],
    config: OptimizerConfig,
    offload: str,
    interval: int,
    mode: MergeMode = MergeMode.unmerged,
) -> None:
    learner = tiny.gradient_learner(
        base, start, optimizer_config=config, offload=offload, mode=mode
    )
    tiny.train(learner, stream, interval=interval)
    assert tiny.distance(learner.export(), wanted, start) <= EXACT
    learner.close()
    free = tiny.gradient_learner(base, start, optimizer_config=tiny.optimizer("sgd"))
    tiny.train(free, stream, interval=interval)
    assert tiny.distance(free.export(), wanted, start) > 0.1, "the clip did nothing"
    free.close()


@pytest.mark.parametrize("clip", ["adapter", "global"])
def test_a_small_gradient_is_not_clipped(clip: str) -> None:
    base = tiny.net()
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 3)
    found = []
    for config in (tiny.optimizer("sgd"), tiny.optimizer("sgd", clip, clip_norm=1e6)):
        learner = tiny.gradient_learner(base, start, optimizer_config=config)
        tiny.train(learner, stream)
        found.append(learner.export())
        learner.close()
    assert tiny.distance(found[1], found[0], start) <= EXACT


# Data that some sites lack


class BranchNet(tiny.TinyNet):
    """`value` runs without teaching at four rows, `twist` does not run at five."""

    def forward(self, features: Tensor) -> tiny.Output:
        num_rows = features.shape[0]
        value = self.value(features)
        x = torch.tanh(self.query(features)) * (value.detach() if num_rows == 4 else value)
        x = torch.tanh(x[..., :4] if num_rows == 5 else self.twist(x))
        return tiny.Output(self.head(torch.tanh(self.again(torch.tanh(self.again(x)))).mean(1)))


@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
@by_interval
@by_offload
def test_sites_without_data_in_an_interval_wait_as_under_autograd(
    offload: str, interval: int, mode: MergeMode
) -> None:
    base = tiny.net(BranchNet)
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 8)
    assert [batch.num_terms for batch in stream[:3]] == [3, 4, 5]
    oracle = tiny.oracle_learner(copy.deepcopy(base), start)
    tiny.train(oracle, stream, interval=interval)
    learner = tiny.gradient_learner(base, start, offload=offload, mode=mode)
    tiny.train(learner, stream, interval=interval)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()


# Saving and continuing


def advance(learner: GradientLearner, stream: list[Batch], first: int, last: int) -> None:
    """Steps first + 1 to last of a stream, in intervals of three."""
    for step in range(first + 1, last + 1):
        number = -(-step // 3)
        adaptation = Adaptation(number=number, learning_rate=0.05 / number)
        closes = step % 3 == 0
        learner.record(stream[step - 1], adaptation if closes else None)
        if closes:
            learner.update(adaptation)


@pytest.mark.parametrize("stop", [2, 3, 7])
@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
@by_offload
def test_a_saved_and_loaded_learner_goes_on_with_the_same_bits(
    tmp_path: Path, offload: str, mode: MergeMode, stop: int
) -> None:
    base = tiny.net()
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 9)
    whole = tiny.gradient_learner(copy.deepcopy(base), start, mode=mode, offload=offload)
    advance(whole, stream, 0, stop)
    save_state(tmp_path / "state", whole.state_dict())
    another_start = tiny.filled_adapters(base, LOWRANK, seed=1)
    other = tiny.gradient_learner(base, another_start, mode=mode, offload=offload)
    advance(other, stream, 0, 2)  # what it did before loading must leave no trace
    other.load_state_dict(load_state(tmp_path / "state"))
    for learner in (whole, other):
        advance(learner, stream, stop, 9)
    wanted = whole.export()
    for site, adapter in other.export().items():
        assert torch.equal(tiny.flat(adapter), tiny.flat(wanted[site])), site
    assert torch.equal(tiny.logits(other, stream[0]), tiny.logits(whole, stream[0]))
    for learner in (whole, other):
        learner.close()


def test_a_learner_shares_nothing_with_the_state_it_loaded() -> None:
    base = tiny.net()
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 8)
    learner = tiny.gradient_learner(base, start)
    advance(learner, stream, 0, 4)
    state = copy.deepcopy(learner.state_dict())
    kept = copy.deepcopy(state)
    learner.load_state_dict(state)
    advance(learner, stream, 4, 8)
    learner.close()
    for site in start:
        for part in ("adapter", "gradient"):
            for name, value in kept["fleet"]["sites"][site][part].items():
                assert torch.equal(state["fleet"]["sites"][site][part][name], value), (site, name)
        for index, moments in kept["fleet"]["sites"][site]["optimizer"].items():
            for name, value in moments.items():
                assert torch.equal(state["fleet"]["sites"][site]["optimizer"][index][name], value)


# Precision


@pytest.mark.parametrize(
    ("kind", "mode"), [pair for pair in tiny.ALLOWED if pair[1] is not MergeMode.detached]
)
def test_a_float32_base_is_fitted_in_float32(kind: AdapterKind, mode: MergeMode) -> None:
    base, single = tiny.net(), tiny.net(dtype=torch.float32)
    start = tiny.filled_adapters(base, kind)
    # AdamW moves weights far enough: over a short way the rounding of the weights themselves,
    # which back-propagation in float32 has too, is more than the tolerance.
    oracle = tiny.oracle_learner(base, start)
    tiny.train(oracle, tiny.batches(base, 5))
    learner = tiny.gradient_learner(single, start, mode=mode, offload="cpu")
    tiny.train(learner, tiny.batches(single, 5, dtype=torch.float32))
    found = learner.export()
    assert {p.dtype for a in found.values() for p in a.parameters()} == {torch.float32}
    found = {site: copy.deepcopy(adapter).double() for site, adapter in found.items()}
    assert tiny.distance(found, oracle.export(), start) <= FLOAT32
    learner.close()


@by_offload
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", list(AdapterKind), ids=lambda kind: kind.name)
def test_products_of_a_bfloat16_base_are_close_to_float32_ones(
    monkeypatch: pytest.MonkeyPatch, kind: AdapterKind, native: bool, offload: str
) -> None:
    monkeypatch.setattr("cola.runtime._has_bfloat16_products", lambda device: native)
    sent: dict[str, list[AdaptationData]] = {}
    accumulate = AdapterFitter.accumulate

    def note(fitter: AdapterFitter, batch: Deliveries) -> None:
        for site, data in batch:
            sent.setdefault(site, []).append(data)
        accumulate(fitter, batch)

    monkeypatch.setattr(AdapterFitter, "accumulate", note)
    base = tiny.net(dtype=torch.bfloat16)
    start = tiny.filled_adapters(base, kind)
    (batch,) = tiny.batches(base, 1, dtype=torch.bfloat16)
    learner = tiny.gradient_learner(base, start, offload=offload)
    learner.record(batch, None)
    worst = 0.0
    for site, adapter in learner.export().items():
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        wanted = copy.deepcopy(adapter).double()
        wanted.zero_grad()
        for part in sent[site]:
            assert part.hidden_input.dtype is torch.bfloat16, "twice the bytes on the wire"
            g = part.hidden_gradient.double()
            (tiny.SCALE * wanted(part.hidden_input.double()) * g).sum().backward()
        for found, true in zip(adapter.parameters(), wanted.parameters(), strict=True):
            assert (found.grad - true.grad).norm() <= 1e-2 * true.grad.norm()
            assert found.grad.dtype is torch.float32
            worst = max(worst, float((found.grad - true.grad).norm() / true.grad.norm()))
    # Products of float32 do far better than that, and must not be formed where they are not asked.
    assert (worst <= FLOAT32) == (not native)
    learner.close()


@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
def test_master_weights_keep_what_bfloat16_would_lose(mode: MergeMode) -> None:
    base = tiny.net(dtype=torch.bfloat16)
    start = tiny.filled_adapters(base, AdapterKind.linear, std=1.0)
    learner = tiny.gradient_learner(base, start, mode=mode, optimizer_config=PLAIN_SGD)
    before = {site: tiny.flat(adapter).clone() for site, adapter in learner.export().items()}
    (batch,) = tiny.batches(base, 1, dtype=torch.bfloat16)
    small = Adaptation(number=1, learning_rate=1e-5)
    learner.record(batch, small)
    learner.update(small)
    after = {site: tiny.flat(adapter) for site, adapter in learner.export().items()}
    for site in start:
        is_moved = after[site] != before[site]
        assert is_moved.float().mean() > 0.5, site
        assert torch.equal(after[site].bfloat16(), before[site].bfloat16())
    assert torch.isfinite(tiny.logits(learner, batch)).all()
    learner.close()


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_a_bfloat16_base_without_biases_trains(merged: bool) -> None:
    base = nn.ModuleDict({"head": nn.Linear(4, 3, bias=False)}).bfloat16()
    base.forward = lambda features: tiny.Output(base["head"](features))
    start = tiny.filled_adapters(base, AdapterKind.linear)
    mode = MergeMode.merged if merged else MergeMode.unmerged
    learner = tiny.gradient_learner(base, start, mode=mode)
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    batch = Batch(inputs={"features": features}, labels=torch.tensor([0, 1, 2]), num_terms=3)
    before = tiny.logits(learner, batch)
    for number in range(1, 41):
        tiny.adapt(learner, batch, number)
    losses = [
        task_loss(Objective.classification, logits.float(), batch).item()
        for logits in (before, tiny.logits(learner, batch))
    ]
    assert losses[1] < 0.5 * losses[0]
    learner.close()


# Measuring


@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
def test_measuring_neither_waits_for_fits_nor_touches_their_tensors(
    monkeypatch: pytest.MonkeyPatch, mode: MergeMode
) -> None:
    base = tiny.net(dtype=torch.bfloat16)
    learner = tiny.gradient_learner(
        base, tiny.filled_adapters(base, LOWRANK), offload="cpu", mode=mode
    )
    idle = learner.measure()
    may_step, step = threading.Event(), AdapterFitter.step

    def hold(fitter: AdapterFitter, *args: object) -> bool:
        assert may_step.wait(timeout=10), "measuring waited for this fit"
        return step(fitter, *args)

    monkeypatch.setattr(AdapterFitter, "step", hold)
    (batch,) = tiny.batches(base, 1, dtype=torch.bfloat16)
    tiny.adapt(learner, batch, 1)
    held = learner.measure().held_bytes["cpu"]
    may_step.set()
    # Gradients are there, and a fit is about to free them: the account is of the last step.
    assert held["adapters"] == idle.held_bytes["cpu"]["adapters"]
    assert held["optimizer"] == 0
    learner.export()
    after = learner.measure().held_bytes["cpu"]
    assert after["adapters"] == 2 * held["adapters"]
    assert after["optimizer"] > 2 * held["adapters"]
    learner.close()


def test_memory_that_fitters_share_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters so large that each steps alone: a gradient's memory is used for the next one's."""
    monkeypatch.setattr("cola.offload.placing.STEPPED_TOGETHER", 0)
    monkeypatch.setattr("cola.offload.buffers.MIN_BYTES", 1)
    monkeypatch.setattr("cola.offload.fitter.MIN_BYTES", 1)
    base = tiny.net(TwinLayers)
    adapters = tiny.filled_adapters(base, AdapterKind.linear)
    learner = tiny.gradient_learner(
        base, adapters, offload="cpu", num_workers=1, mode=MergeMode.merged
    )
    tiny.train(learner, tiny.batches(base, 5))
    learner.export()
    held = learner.measure().held_bytes["cpu"]
    assert held["adapters"] == sum(count_bytes(a.parameters()) for a in adapters.values())
    assert 0 < held["gradients"] <= held["adapters"] / len(adapters) * (MAX_PENDING + 1)
    assert held["merged"] == held["pristine"] > 0
    learner.close()
    on_base = tiny.gradient_learner(base, adapters, mode=MergeMode.merged, pristine=Pristine.base)
    held = on_base.measure().held_bytes["cpu"]
    assert held["pristine"] > 0
    assert "merged" not in held
    on_base.close()


def test_measuring_while_fits_run_does_not_crash() -> None:
    base = tiny.net(dtype=torch.bfloat16)
    learner = tiny.gradient_learner(
        base, tiny.filled_adapters(base, LOWRANK), offload="cpu", mode=MergeMode.merged
    )
    (batch,) = tiny.batches(base, 1, dtype=torch.bfloat16)
    before = learner.measure()
    for number in range(1, 21):
        tiny.adapt(learner, batch, number)
        for _ in range(5):
            now = learner.measure()
            assert now.wire_bytes >= before.wire_bytes
            assert now.offload_seconds >= before.offload_seconds
            before = now
    assert 0.0 <= now.extra["merge/lost_share"] <= 1.0
    learner.close()


def test_measurements_tell_the_two_sides_apart() -> None:
    base = tiny.net()
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 2)
    costs = {}
    for offload in ("none", "cpu"):
        learner = tiny.gradient_learner(base, start, offload=offload)
        tiny.train(learner, stream)
        learner.export()
        costs[offload] = learner.measure()
        assert learner.num_trainable == sum(
            p.numel() for a in start.values() for p in a.parameters()
        )
        learner.close()
    assert costs["none"].wire_bytes == 0
    assert costs["cpu"].wire_bytes > 0
    for cost in costs.values():
        assert min(cost.base_seconds, cost.offload_seconds) > 0
        assert cost.held_bytes["cpu"].keys() >= {"adapters", "optimizer", "staging", "base_model"}


# Workers


def test_a_thread_runs_its_tasks_in_order_with_the_cores_it_was_given() -> None:
    worker = ThreadWorker("test", CPU, num_threads=1)
    done: list[int] = []
    futures = [
        worker.submit(lambda index=index: (time.sleep(0.001), done.append(index)))
        for index in range(5)
    ]
    threads = worker.submit(torch.get_num_threads)
    name = worker.submit(lambda: threading.current_thread().name)
    worker.stop()
    assert done == list(range(5))
    assert all(future.done() for future in futures)
    assert threads.result() == 1
    assert name.result().startswith("test")
    assert worker.busy_seconds() >= 0.005


def test_an_inline_worker_runs_a_task_before_it_returns() -> None:
    worker = InlineWorker(CPU)
    ran_in = worker.submit(threading.current_thread)
    assert ran_in.result() is threading.current_thread()
    assert worker.busy_seconds() > 0
    worker.stop()


@pytest.mark.parametrize("clip", ["none", "adapter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gpu_names_the_broken_site_when_it_is_asked(
    build_fleet: FleetBuilder, clip: str, value: float
) -> None:
    fleet = build_fleet("none", tiny.optimizer("adamw", clip))
    (slot,) = fleet._slots
    slot.fitter.device = torch.device("cuda")  # all that tells a fitter not to look at every step
    for number in (1, 2):
        fleet.begin_step(fit(number))
        put(fleet, "first", data())
        put(fleet, "second", data(value if number == 1 else None))
        fleet.finish()  # a step later all gradients are finite again
    with pytest.raises(OffloadError, match="hidden gradient of site 'second' is not finite"):
        fleet.drain()


def test_a_worker_is_never_more_than_an_adaptation_ahead_of_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[int] = []

    class Issued:
        """Of an adaptation, on a GPU that takes its time."""

        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            waited.append(self.number)

    numbers = itertools.count(1)
    monkeypatch.setattr(Transfer, "issued", lambda _: Issued(next(numbers)))
    monkeypatch.setattr(Transfer, "follow", lambda *_: None)
    fitter = AdapterFitter(
        {"first": tiny.filled_adapter(AdapterKind.linear, tiny.site("linear").spec)},
        tiny.optimizer(),
        scale=1.0,
    )
    cpu = torch.device("cpu")
    berth = Berth(
        fitter=fitter, worker=InlineWorker(cpu), transfer=Transfer(cpu, cpu), blocks=[["first"]]
    )
    slot = Slot(berth, lambda adapters: {site: {} for site in adapters}, overlaps=True, staleness=0)
    for number in (1, 2, 3):
        slot.fit(fit(number), 1.0)
    assert waited == [1, 2], "the first has none before it"
