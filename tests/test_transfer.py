"""Data that leaves in the forward pass, by copies that take their time: still autograd."""

import copy
import functools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from cola.adapters import Adapter, build_adapter
from cola.autograd_learner import AutogradLearner
from cola.config.choices import AdapterKind, MergeMode, Payload
from cola.config.schema import AdapterConfig
from cola.errors import OffloadError, SiteError
from cola.gradient_learner import GradientLearner
from cola.gradient_wiring import build_gradient_learner
from cola.interfaces import Adaptation
from cola.kept_rows import KeptRows
from cola.offload import fitter, placing
from cola.offload.buffers import Buffers
from cola.offload.fit import Fit
from cola.offload.fitter import AdapterFitter
from cola.offload.payload import choose_payloads
from cola.offload.placing import OffloadPlan
from cola.offload.transfer import Transfer
from cola.site_calls import SiteRun
from cola.sites import SiteKind, SiteSpec
from tests import tiny
from tests.tolerances import EXACT
from tests.wires import LaggingTransfer

CPU = torch.device("cpu")
LOWRANK, LINEAR, MLP = AdapterKind.lowrank, AdapterKind.linear, AdapterKind.mlp


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> list[LaggingTransfer]:
    """Every transfer that is made is a lagging one, and is noted."""
    made: list[LaggingTransfer] = []

    class Noted(LaggingTransfer):
        def __init__(self, *args: torch.device, **settings: torch.dtype | None) -> None:
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(placing, "Transfer", Noted)
    return made


def build(
    base: nn.Module,
    kind: AdapterKind,
    mode: MergeMode = MergeMode.unmerged,
    **plan: int | Payload | bool,
) -> GradientLearner:
    """A learner whose fits run on two threads."""
    return build_gradient_learner(
        base,
        tiny.specs(base),
        copy.deepcopy(tiny.filled_adapters(base, kind)),
        tiny.settings(mode=mode, offload=OffloadPlan(devices=(CPU,), workers=2, **plan)),
    )


def oracle_of(base: nn.Module, kind: AdapterKind) -> AutogradLearner:
    return tiny.oracle_learner(base, tiny.filled_adapters(base, kind))


@pytest.mark.parametrize("payload", list(Payload), ids=lambda payload: payload.name)
@pytest.mark.parametrize(
    ("net", "interval"),
    [
        (tiny.TinyNet, 2),
        (tiny.CheckpointedNet, 1),
        pytest.param(tiny.TinyConv, 1, marks=pytest.mark.slow),
        pytest.param(tiny.TinyNet, 1, marks=pytest.mark.slow),
        pytest.param(tiny.CheckpointedNet, 2, marks=pytest.mark.slow),
        pytest.param(tiny.TinyConv, 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("kind", "mode"),
    [(LOWRANK, MergeMode.unmerged), (LOWRANK, MergeMode.merged), (LINEAR, MergeMode.unmerged),
     (LINEAR, MergeMode.merged), (MLP, MergeMode.unmerged)],
    ids=lambda value: value.name,
)  # fmt: skip
def test_weights_equal_autograd(
    wires: list[LaggingTransfer],
    kind: AdapterKind,
    mode: MergeMode,
    net: type[nn.Module],
    interval: int,
    payload: Payload,
) -> None:
    if payload is Payload.gradient and mode is MergeMode.merged and kind is LOWRANK:
        pytest.skip("refused by the configuration: the parameters are not there")
    plain, base = tiny.net(net if net is tiny.TinyConv else tiny.TinyNet), tiny.net(net)
    stream = tiny.batches(base, 5)
    oracle = oracle_of(plain, kind)
    tiny.train(oracle, stream, interval=interval)
    learner = build(base, kind, mode, payload=payload, base_gradients=True, num_rows=16)
    tiny.train(learner, stream, interval=interval)
    start = tiny.filled_adapters(base, kind)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    assert wires[0].num_copies
    learner.close()


def test_a_formed_gradient_lands_where_it_is_summed(
    wires: list[LaggingTransfer], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.net(dtype=torch.float32).bfloat16()
    first: dict[str, tuple[torch.dtype, bool]] = {}
    add = AdapterFitter.add_gradients

    def noting(
        fitter: AdapterFitter, site: str, gradients: Mapping[str, Tensor], norms: Tensor
    ) -> None:
        add(fitter, site, gradients, norms)
        weight = gradients["weight"]
        is_kept = fitter.state_dict(site)["gradient"]["weight"].data_ptr() == weight.data_ptr()
        first.setdefault(site, (weight.dtype, is_kept))  # later calls are added to it

    monkeypatch.setattr(AdapterFitter, "add_gradients", noting)
    monkeypatch.setattr(fitter, "MIN_BYTES", 0)  # as if they were large
    adapters = copy.deepcopy(tiny.filled_adapters(base, LINEAR))
    learner = build_gradient_learner(
        base,
        tiny.specs(base),
        {site: adapter.float() for site, adapter in adapters.items()},
        tiny.settings(
            mode=MergeMode.merged,
            offload=OffloadPlan(devices=(CPU,), workers=1, payload=Payload.gradient),
        ),
    )
    tiny.train(learner, tiny.batches(base, 1, dtype=torch.bfloat16))
    learner.export()  # nothing is under way, and nothing went wrong
    learner.close()
    assert first == dict.fromkeys(tiny.specs(base), (torch.float32, True))


@pytest.mark.parametrize("clip", ["none", "adapter"])
@pytest.mark.parametrize("num_batches", [1, 2])
def test_norms_that_came_along_are_used_unless_gradients_were_summed(
    clip: str, num_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = tiny.specs(tiny.net())
    own = {site: tiny.filled_adapter(LINEAR, specs[site]) for site in ("query", "value")}
    settings = tiny.optimizer("sgd", clip, clip_norm=0.5)
    asked, plain = (AdapterFitter(copy.deepcopy(own), settings, scale=1.0) for _ in range(2))
    read: list[int] = []
    norms_of = fitter.norms_of
    monkeypatch.setattr(fitter, "norms_of", lambda own: [read.append(len(own)), norms_of(own)][1])
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_batches):
        for site, adapter in own.items():
            gradients = {
                name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
                for name, p in adapter.named_parameters()
            }
            norms = torch.stack([gradient.norm() for gradient in gradients.values()])
            plain.add_gradients(site, copy.deepcopy(gradients))
            asked.add_gradients(site, gradients, norms if site == "query" else None)
    fit = Fit(number=1, learning_rate=0.1, gradient_scale=1.0)
    plain.step(fit)
    assert read == [4]
    read.clear()
    asked.gradient_norm("query", fit)  # what clipping across sites asks for
    assert read == ([] if num_batches == 1 else [2])
    read.clear()
    asked.step(fit)
    assert read == ([2] if num_batches == 1 else [4])
    start = {site: tiny.filled_adapter(LINEAR, specs[site]) for site in own}
    assert tiny.distance(asked.adapters, plain.adapters, start) <= EXACT
    asked.add_gradients("query", gradients)  # no norm outlives its gradient
    read.clear()
    asked.step(fit)
    assert read == [2]


def test_norms_of_rounded_gradients_are_taken_where_they_are_summed() -> None:
    specs = tiny.specs(tiny.net())
    adapter = tiny.filled_adapter(LINEAR, specs["query"])
    fitting = AdapterFitter({"query": adapter}, tiny.optimizer(), scale=1.0)
    gradients = {n: torch.ones(p.shape).bfloat16() for n, p in adapter.named_parameters()}
    fitting.add_gradients("query", gradients, torch.tensor([float("nan")] * 2))
    assert fitting.step(Fit(number=1, learning_rate=0.1, gradient_scale=1.0)) == ["query"]


def test_a_broken_gradient_is_told_by_the_norm_that_came_along() -> None:
    specs = tiny.specs(tiny.net())
    adapter = tiny.filled_adapter(LINEAR, specs["query"])
    fitting = AdapterFitter({"query": adapter}, tiny.optimizer(), scale=1.0)
    gradients = {n: torch.ones_like(p) for n, p in adapter.named_parameters()}
    fitting.add_gradients("query", gradients, torch.tensor([1.0, float("inf")]))
    with pytest.raises(OffloadError, match="hidden gradient of site 'query' is not finite"):
        fitting.step(Fit(number=1, learning_rate=0.1, gradient_scale=1.0))


def test_memory_that_data_lands_in_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers, shape = Buffers(), torch.Size([1024, 512])
    plain, pinned = torch.empty(shape), torch.empty(shape)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor is pinned)
    for tensor in (pinned, plain):
        buffers.give(tensor)
    assert buffers.take(shape, torch.float32) is plain
    assert buffers.take(shape, torch.float32) is not pinned


def test_nothing_of_the_forward_pass_is_held_in_the_backward_pass(
    wires: list[LaggingTransfer], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, log = tiny.net(), []
    learner = build(base, LOWRANK)
    monkeypatch.setattr(wires[0], "forget", lambda: log.append("forget"))
    ship = wires[0].ship
    monkeypatch.setattr(wires[0], "ship", lambda cargo: [log.append("send"), ship(cargo)][1])
    base.register_forward_hook(lambda *_: log.append("loss"))
    batch = tiny.batches(base, 1)[0]
    learner.record(batch, Adaptation(number=1, learning_rate=0.1))
    end = log.index("loss")
    assert log[0] == "forget"
    assert log[1:end] == ["send"] * (end - 1)
    assert log[end + 1] == "forget"
    assert set(log[end + 2 :]) == {"send"}
    learner.update(Adaptation(number=1, learning_rate=0.1))
    learner.close()


def test_one_hidden_input_travels_once(wires: list[LaggingTransfer]) -> None:
    base = tiny.net()
    learner = build(base, LOWRANK)
    tiny.train(learner, tiny.batches(base, 1))
    # Six calls of five sites: query and value have one input, the shared site ran twice.
    assert wires[0].num_copies == 5 + 6
    learner.close()


class _ResidualInPlace(nn.Module):
    """Writes to a site's input after the site ran, which only its own graph does not mind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, features: Tensor) -> tiny.Output:
        x = self.first(features)
        x += self.second(x)
        return tiny.Output(self.head(x.mean(dim=1)))


def test_a_hidden_input_that_changes_on_its_way_is_noticed(wires: list[LaggingTransfer]) -> None:
    base = tiny.net(_ResidualInPlace)
    learner = build(base, LOWRANK)
    with pytest.raises(SiteError, match=r"'second' was changed in place .*leave the site out"):
        tiny.train(learner, tiny.batches(base, 1))
    learner.close()


def test_memory_of_a_hidden_input_that_left_is_free(wires: list[LaggingTransfer]) -> None:
    base = tiny.net()
    learner = build(base, LOWRANK)
    (batch,) = tiny.batches(base, 1)
    learner.record(batch, None)
    learner.state_dict()
    staged = wires[0].staged
    assert staged.now == 0 < staged.peak <= staged.total
    assert wires[0].held_bytes > staged.peak, "its memory comes in powers of two"
    learner.close()


# Staleness


def train_late(base: nn.Module, kind: AdapterKind, num_steps: int) -> dict[str, Tensor]:
    """By hand: hidden gradients are those of one adaptation before, fitted by the newest adapter.

    Eq. (6) at the newest w: w takes no part in the forward pass but for its gradient.
    """
    shown, newest = tiny.filled_adapters(base, kind), tiny.filled_adapters(base, kind)

    def adapt(site: str, module: nn.Module, args: tuple[Tensor], hidden: Tensor) -> Tensor:
        fitted = newest[site](args[0].detach())
        return hidden + tiny.SCALE * (shown[site](args[0]) + fitted - fitted.detach())

    for site in newest:
        base.get_submodule(site).register_forward_hook(functools.partial(adapt, site))
    stepped = [p for adapter in newest.values() for p in adapter.parameters()]
    optimizer = tiny.build_optimizer(stepped, tiny.optimizer())
    for step, batch in enumerate(tiny.batches(base, num_steps), start=1):
        loss = tiny.task_loss(tiny.Objective.classification, base(**batch.inputs).logits, batch)
        loss.backward()
        before = copy.deepcopy(newest)
        tiny.optimizer_step(optimizer, 0.05 / step)
        optimizer.zero_grad()
        shown.update(before)
    return named_parameters(newest)


def named_parameters(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    return {
        f"{site}.{name}": parameter.detach()
        for site, adapter in adapters.items()
        for name, parameter in adapter.named_parameters()
    }


@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
def test_staleness_lags_exactly_one_adaptation(mode: MergeMode) -> None:
    base = tiny.net()
    wanted = train_late(tiny.net(), LOWRANK, 6)
    learner = build(base, LOWRANK, mode, staleness=1)
    tiny.train(learner, tiny.batches(base, 6))
    found, start = named_parameters(learner.export()), tiny.filled_adapters(base, LOWRANK)
    for name, before in named_parameters(start).items():
        moved = (wanted[name] - before).norm()
        assert (found[name] - wanted[name]).norm() <= EXACT * moved, name
    learner.close()


def test_after_an_evaluation_nothing_is_stale() -> None:
    """A checkpoint goes on as the run that wrote it: both start from the newest parameters."""
    base = tiny.net()
    stream = tiny.batches(base, 6)
    whole, half = build(base, LOWRANK, staleness=1), build(tiny.net(), LOWRANK, staleness=1)
    for learner in (whole, half):
        advance(learner, stream[:3], 0)
    state = copy.deepcopy(half.state_dict())
    tiny.logits(whole, stream[0])
    resumed = build(tiny.net(), LOWRANK, staleness=1)
    resumed.load_state_dict(state)
    for learner in (whole, resumed):
        advance(learner, stream[3:], 3)
    for site, adapter in whole.export().items():
        assert torch.equal(tiny.flat(adapter), tiny.flat(resumed.export()[site])), site
    for learner in (whole, half, resumed):
        learner.close()


def advance(learner: GradientLearner, stream: Sequence[tiny.Batch], done: int) -> None:
    for number, batch in enumerate(stream, start=done + 1):
        closing = Adaptation(number=number, learning_rate=0.05 / number)
        learner.record(batch, closing)
        learner.update(closing)


# What was measured stays chosen


@pytest.mark.parametrize(
    ("num_rows", "dtype", "wire", "chosen"),
    [
        (48, torch.float32, None, Payload.gradient),
        (48, torch.bfloat16, None, Payload.factors),
        (48, torch.bfloat16, torch.bfloat16, Payload.gradient),
        (24, torch.float32, None, Payload.factors),
        (24, torch.float32, torch.bfloat16, Payload.factors),
    ],
)
def test_auto_weighs_what_travels(
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    dtype: torch.dtype,
    wire: torch.dtype | None,
    chosen: Payload,
) -> None:
    """Rows of 64 and 64 numbers, or 64 x 64 of them in float32; on the wire perhaps narrower."""
    monkeypatch.setattr("cola.offload.payload._wire_rate", lambda *_: 1.0)
    monkeypatch.setattr("cola.offload.payload.gradient_seconds", lambda *_: 0.0)
    spec = SiteSpec(name="q", kind=SiteKind.linear, in_features=64, out_features=64)
    adapter = build_adapter(AdapterConfig(kind=LINEAR), spec, seed=0)
    found = choose_payloads(
        {"q": adapter},
        payload=Payload.auto,
        base=CPU,
        dtype=dtype,
        wire=wire,
        num_rows=num_rows,
        eligible=lambda _: True,
    )
    assert found == {"q": chosen}


def test_a_resumed_run_keeps_its_payloads(wires: list[LaggingTransfer]) -> None:
    base = tiny.net()
    chosen = build(base, LINEAR, payload=Payload.gradient)
    other = build(tiny.net(), LINEAR)
    other.load_state_dict(copy.deepcopy(chosen.state_dict()))
    wires[1].num_copies = 0
    other.record(tiny.batches(base, 1)[0], None)
    assert wires[1].num_copies == 3 * 6  # weight, bias and their norms, of every call
    chosen.close()
    other.close()


def test_rows_are_rounded_to_the_dtype_of_the_wire() -> None:
    spec = SiteSpec(name="site", kind=SiteKind.linear, in_features=3, out_features=2)
    x = torch.randn(4, 5, 3)
    wire = Transfer(CPU, CPU, wire_dtype=torch.bfloat16)
    (sent,) = wire.ship([wire.rows_of(x, spec, x.dtype, None)])
    assert torch.equal(sent(), x.reshape(20, 3).bfloat16())


def test_a_hidden_input_is_known_by_its_state_its_dtype_and_its_rows() -> None:
    wire = LaggingTransfer(torch.device("cpu"), torch.device("cpu"))
    spec = SiteSpec(name="q", kind=SiteKind.linear, in_features=3, out_features=3)
    x = torch.rand(2, 2, 3, dtype=torch.float64)
    some = KeptRows(shape=(2, 2), index=torch.tensor([0, 2]))

    def send(*runs: SiteRun) -> list[Tensor]:
        return [parcel() for parcel in wire.send_distinct([(spec, run) for run in runs])]

    plain = SiteRun("q", x, x.dtype)
    first, second = send(plain, plain._replace(site="v"))
    (again,) = send(plain)
    assert first is second is again
    (single, few) = send(plain._replace(dtype=torch.float32), plain._replace(kept=some))
    assert (single.dtype, len(few)) == (torch.float32, 2)
    assert wire.num_copies == 3
    x += 1.0
    (changed,) = send(plain)
    assert torch.equal(changed, x.flatten(0, 1))
    assert not torch.equal(first, changed)
    wire.forget()
    send(plain)
    assert wire.num_copies == 5


def test_a_host_sleeps_until_the_copy_before_and_then_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[object] = []

    class Passing:
        """An event that is looked at."""

        def record(self, stream: object) -> None:
            self.recorded_on = stream

        def synchronize(self) -> None:
            waited.append(("looked", self.recorded_on))

    class Arrived:
        """One that is slept for."""

        def synchronize(self) -> None:
            waited.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Passing)
    wire = Transfer(CPU, CPU)
    wire._stream = "copies"  # type: ignore[assignment]
    sent = [Arrived(), Arrived()]
    first, second = (wire._waiting(event) for event in sent)  # type: ignore[arg-type]
    tensor = torch.zeros(1)
    second(tensor)
    first(tensor)
    looked = ("looked", "copies")
    assert waited == [sent[0], looked, looked], "nothing was sent before the first"


@pytest.mark.parametrize(("kept", "num_rows"), [(None, 10), ([1, 3, 4], 3)])
def test_bytes_of_a_run_are_those_of_rows_that_travel(
    kept: list[int] | None, num_rows: int
) -> None:
    x = torch.zeros(2, 5, 3, dtype=torch.bfloat16)
    rows = None if kept is None else KeptRows(shape=(2, 5), index=torch.tensor(kept))
    assert SiteRun("q", x, x.dtype, rows).num_bytes == num_rows * 3 * 2
    if rows is not None:
        assert SiteRun("q", rows.take(x), x.dtype, rows).num_bytes == num_rows * 3 * 2
