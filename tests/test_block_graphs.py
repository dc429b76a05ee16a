"""Blocks that are replayed, with a capturer that runs the work again where a GPU would replay it.

Memory is treated as a GPU's graphs treat it: what a replay writes lies where it was captured, and
what was released is overwritten before anybody could rely on it.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cola.offload.placing
from cola.bank import Bank
from cola.block_graphs import find_blocks
from cola.config.choices import AdapterKind, MergeMode, Objective
from cola.cuda_capture import _span
from cola.errors import ConfigError, TrainingError
from cola.gradient_learner import GradientLearner
from cola.gradient_settings import resolve_settings
from cola.gradient_wiring import build_gradient_learner
from cola.installer import Installer
from cola.interfaces import Adaptation
from cola.task_data import Batch
from tests import tiny
from tests.configs import composed
from tests.layered import Chain, Collecting, Layer, LayeredNet
from tests.rerun import Rerun
from tests.tolerances import EXACT
from tests.wires import LaggingTransfer


def learner_of(
    net: nn.Module, start: dict[str, Any], capturer: Rerun | None, **settings: Any
) -> GradientLearner:
    capturers = None if capturer is None else lambda device: capturer
    return build_gradient_learner(
        net, tiny.specs(net), copy.deepcopy(start), tiny.settings(capturers=capturers, **settings)
    )


def distance_from_autograd(
    net_type: type[nn.Module],
    kind: AdapterKind,
    stream: list[Batch],
    interval: int,
    **settings: Any,
) -> tuple[float, Rerun]:
    start = tiny.filled_adapters(tiny.net(net_type), kind)
    oracle = tiny.oracle_learner(tiny.net(net_type), start)
    wanted_losses = tiny.train(oracle, stream, interval=interval)
    capturer = Rerun()
    learner = learner_of(tiny.net(net_type), start, capturer, **settings)
    losses = tiny.train(learner, stream, interval=interval)
    found = learner.export()
    learner.close()
    assert losses == pytest.approx(wanted_losses, rel=1e-10)
    return tiny.distance(found, oracle.export(), start), capturer


FORMS = [pair for pair in tiny.ALLOWED if pair[1] is not MergeMode.detached]


@pytest.mark.parametrize("wire", ["none", pytest.param("shared", marks=pytest.mark.slow), "late"])
@pytest.mark.parametrize(("kind", "mode"), FORMS)
@pytest.mark.parametrize("interval", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_weights_equal_autograd(
    kind: AdapterKind, mode: MergeMode, interval: int, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wire == "late":
        monkeypatch.setattr(cola.offload.placing, "Transfer", LaggingTransfer)
    stream = tiny.batches(LayeredNet(), 11)  # of three sizes
    plan = tiny.offload_plan(0 if wire == "none" else 2)
    distance, capturer = distance_from_autograd(
        LayeredNet, kind, stream, interval, mode=mode, offload=plan
    )
    assert distance <= EXACT
    assert capturer.num_captures == 3 * 4 * 2
    assert capturer.num_replays == (11 - 2 * 3) * 4 * 2


@pytest.mark.parametrize(("net_type", "num_free"), [(Chain, 6), (Collecting, 0)])
def test_what_the_next_block_alone_reads_is_free_when_it_has_run(
    net_type: type[nn.Module], num_free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last two blocks it is not known: what comes after them is no block."""
    monkeypatch.setattr(cola.offload.placing, "Transfer", LaggingTransfer)  # hidden inputs leave
    capturer = Rerun()
    stream = [tiny.batches(net_type(), 1)[0]] * 5
    start = tiny.filled_adapters(tiny.net(net_type), AdapterKind.lowrank)
    oracle = tiny.oracle_learner(tiny.net(net_type), start)
    learner = learner_of(tiny.net(net_type), start, capturer, offload=tiny.offload_plan(2))
    assert tiny.train(learner, stream) == pytest.approx(tiny.train(oracle, stream), rel=1e-10)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    # By the block that answered, and by the one that read it; a hidden input leaves every block.
    assert sum(since <= 8 for since, _ in capturer.released) == 2 * num_free + 8
    learner.close()


def test_model_without_lists_is_one_block() -> None:
    stream = tiny.batches(tiny.TinyNet(), 12)
    distance, capturer = distance_from_autograd(tiny.TinyNet, AdapterKind.lowrank, stream, 1)
    assert distance <= EXACT
    assert capturer.num_captures == 3 * 2


def test_calls_of_another_kind_run_as_ever() -> None:
    """The same shape of batch, but a block is called otherwise: nothing is mixed."""
    net = tiny.net(LayeredNet)
    start = tiny.filled_adapters(net, AdapterKind.lowrank)
    oracle_net = tiny.net(LayeredNet)
    oracle = tiny.oracle_learner(oracle_net, start)
    capturer = Rerun()
    learner = learner_of(net, start, capturer)
    stream = [tiny.batches(net, 1)[0]] * 6
    for number, batch in enumerate(stream, start=1):
        for one in (net, oracle_net):
            one.scale = 0.5 if number % 2 else 0.25  # type: ignore[assignment]
        closing = Adaptation(number=number, learning_rate=0.05)
        for one in (learner, oracle):
            one.record(batch, closing)
            one.update(closing)
    # Each was noted when it came again, and replayed from then on.
    assert capturer.num_captures == 2 * 4 * 2
    assert capturer.num_replays == 2 * 4 * 2
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()


def test_later_block_called_otherwise_runs_as_ever() -> None:
    net, oracle_net = tiny.net(LayeredNet), tiny.net(LayeredNet)
    start = tiny.filled_adapters(net, AdapterKind.lowrank)
    oracle = tiny.oracle_learner(oracle_net, start)
    capturer = Rerun()
    learner = learner_of(net, start, capturer)
    for number in range(1, 6):
        for one in (net, oracle_net):
            one.last_scale = 0.5 if number < 4 else 0.25  # type: ignore[assignment]
        closing = Adaptation(number=number, learning_rate=0.05)
        for one in (learner, oracle):
            one.record(tiny.batches(net, 1)[0], closing)
            one.update(closing)
    assert capturer.num_replays == (4 + 3 + 3) * 2
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()


class TwiceNet(LayeredNet):
    """The first layer runs twice, and shares a site with the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first[1] = self.first[0]
        self.second[1].query = self.second[0].query


class Deaf(Layer):
    """Uses nothing of what the model gives to all layers."""

    def forward(self, x: Tensor, scale: float, *, gate: dict[str, Tensor]) -> Any:
        return super().forward(x, scale, gate={"gate": torch.tensor(0.5, dtype=x.dtype)})


class DeafNet(LayeredNet):
    def __init__(self) -> None:
        super().__init__()
        self.second[1] = Deaf()


def test_what_a_block_does_not_use_gets_no_gradient_from_it() -> None:
    stream = tiny.batches(DeafNet(), 11)
    distance, capturer = distance_from_autograd(DeafNet, AdapterKind.lowrank, stream, 1)
    assert distance <= EXACT
    assert capturer.num_captures == 3 * 4 * 2


def test_second_run_of_a_block_runs_as_ever() -> None:
    stream = tiny.batches(TwiceNet(), 11)
    for mode in (MergeMode.unmerged, MergeMode.merged):
        distance, capturer = distance_from_autograd(
            TwiceNet, AdapterKind.lowrank, stream, 1, mode=mode, offload=tiny.offload_plan(2)
        )
        assert distance <= EXACT
        assert capturer.num_captures == 3 * 3 * 2


def test_a_batch_that_was_changed_in_place_is_read_again() -> None:
    batch = tiny.batches(LayeredNet(), 1)[0]
    start = tiny.filled_adapters(tiny.net(LayeredNet), AdapterKind.lowrank)
    oracle = tiny.oracle_learner(tiny.net(LayeredNet), start)
    learner = learner_of(tiny.net(LayeredNet), start, Rerun())
    for number in range(1, 6):
        batch.inputs["features"].mul_(1.3)
        closing = Adaptation(number=number, learning_rate=0.05)
        for one in (learner, oracle):
            one.record(batch, closing)
            one.update(closing)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()


def test_stale_parameters_are_those_of_a_run_without_graphs() -> None:
    start = tiny.filled_adapters(tiny.net(LayeredNet), AdapterKind.lowrank)
    stream = tiny.batches(LayeredNet(), 12)
    plan = dataclasses.replace(tiny.offload_plan(2), staleness=1)
    losses = []
    for capturer in (None, Rerun()):
        learner = learner_of(tiny.net(LayeredNet), start, capturer, offload=plan)
        losses.append(tiny.train(learner, stream))
        learner.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
def test_parameters_stay_where_graphs_read_them(mode: MergeMode, workers: int) -> None:
    net = tiny.net(LayeredNet)
    start = tiny.filled_adapters(net, AdapterKind.lowrank)
    plan = tiny.offload_plan(workers)
    learner = learner_of(net, start, Rerun(), mode=mode, offload=plan)
    placement = learner._placement

    def addresses() -> list[int]:
        beside = isinstance(placement, Bank)
        modules = [placement.adapter(site) for site in start] if beside else [net]
        return [parameter.data_ptr() for one in modules for parameter in one.parameters()]

    stream = [tiny.batches(net, 1)[0]] * 4
    tiny.train(learner, stream[:2])
    before = addresses()
    learner.load_state_dict(learner.state_dict())
    with learner.evaluating(merged=mode is MergeMode.unmerged) as model, torch.no_grad():
        model(**stream[0].inputs)
    tiny.train(learner, stream)
    assert addresses() == before
    learner.close()


class TwoInputs(LayeredNet):
    """What the second list of layers reads may have another shape than what the first does."""

    def forward(self, features: Tensor, more: Tensor) -> tiny.Output:  # type: ignore[override]
        x, y = features, more
        for layer in self.first:
            x, *_ = layer(x, 0.5, gate={"gate": torch.sigmoid(self.gates(x))})
        for layer in self.second:
            y, *_ = layer(y, 0.5, gate={"gate": torch.sigmoid(self.gates(y))})
        return tiny.Output(self.head(x.mean(dim=1) + y.mean(dim=1)))


def test_every_shape_of_the_whole_batch_is_captured() -> None:
    """As of an encoder-decoder: equal for the first block, another for later ones."""
    stream = [
        dataclasses.replace(
            batch, inputs={"features": batch.inputs["features"][:, :2], "more": more}
        )
        for batch in [tiny.batches(LayeredNet(), 1)[0]] * 5
        for more in (batch.inputs["features"], batch.inputs["features"][:, :3])
    ]
    distance, capturer = distance_from_autograd(TwoInputs, AdapterKind.lowrank, stream, 1)
    assert distance <= EXACT
    assert capturer.num_captures == 2 * 4 * 2
    assert capturer.num_replays == 2 * 3 * 4 * 2


def test_evaluation_and_what_comes_after_use_own_forwards() -> None:
    net = tiny.net(LayeredNet)
    net.first[0].forward = own = net.first[0].forward  # type: ignore[method-assign,index,union-attr]
    capturer = Rerun()
    learner = learner_of(net, tiny.filled_adapters(net, AdapterKind.lowrank), capturer)
    stream = [tiny.batches(net, 1)[0]] * 3
    tiny.train(learner, stream)
    replays = capturer.num_replays
    with learner.evaluating() as model, torch.no_grad():
        model(**stream[0].inputs)
    assert capturer.num_replays == replays > 0
    learner.close()
    layers = [layer for layer in net.modules() if isinstance(layer, Layer)]
    assert ["forward" in vars(layer) for layer in layers] == [True, False, False, False]
    assert layers[0].forward is own


def test_number_of_shapes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cola.block_graphs.MAX_SHAPES", 2)
    stream = tiny.batches(LayeredNet(), 12)
    distance, capturer = distance_from_autograd(LayeredNet, AdapterKind.lowrank, stream, 1)
    assert distance <= EXACT
    assert capturer.num_captures == 2 * 4 * 2


def test_block_that_cannot_be_captured_ends_the_run() -> None:
    class Broken(Rerun):
        def capture(self, work: Callable[[], list[Tensor]]) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    net = tiny.net(LayeredNet)
    learner = learner_of(net, tiny.filled_adapters(net, AdapterKind.lowrank), Broken())
    with pytest.raises(TrainingError, match=r"cannot be captured.*not permitted.*leave it out"):
        tiny.train(learner, [tiny.batches(net, 1)[0]] * 2)
    learner.close()


def test_parameters_return_while_the_backward_pass_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released: list[str] = []
    installed: list[tuple[str, int]] = []
    install, fetch = Installer.release, Installer._fetch

    def count(self: Installer, sites: Sequence[str], version: int) -> None:
        installed.extend((site, version) for site in sites)
        fetch(self, sites, version)

    monkeypatch.setattr(Installer, "_fetch", count)

    def note(self: Installer, sites: Iterable[str]) -> None:
        own = list(sites)
        released.extend(own)
        install(self, own)

    monkeypatch.setattr(Installer, "release", note)
    net = tiny.net(LayeredNet)
    learner = learner_of(
        net, tiny.filled_adapters(net, AdapterKind.lowrank), Rerun(), offload=tiny.offload_plan(2)
    )
    tiny.train(learner, [tiny.batches(net, 1)[0]] * 3)
    assert sorted(released) == sorted(name for name in tiny.specs(net) if "." in name)
    assert released[0].startswith("second.1.")
    assert max(Counter(installed).values()) == 1
    learner.close()


def test_a_block_waits_for_its_own_parameters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the blocks after come while it runs: nothing waits for their copies."""
    rerun = Rerun()
    log: list[tuple[list[str], int]] = []
    require, fetch_ahead = Installer.require, Installer.fetch_ahead

    def note_required(self: Installer, sites: Sequence[str]) -> None:
        log.append((list(sites), rerun.num_replays))
        require(self, sites)

    def note_ahead(self: Installer) -> None:
        log.append(([], rerun.num_replays))
        fetch_ahead(self)

    net = tiny.net(LayeredNet)
    learner = learner_of(net, tiny.filled_adapters(net, AdapterKind.lowrank), rerun)
    batches = [tiny.batches(net, 1)[0]] * 3
    tiny.train(learner, batches[:2])
    monkeypatch.setattr(Installer, "require", note_required)
    monkeypatch.setattr(Installer, "fetch_ahead", note_ahead)
    tiny.train(learner, batches[2:])
    own = ("query", "value", "again")
    expected = [["gates"], []]
    for block in ("first.0", "first.1", "second.0", "second.1"):
        expected += [[f"{block}.{name}" for name in own], []]
    assert [sites for sites, _ in log] == [*expected, ["head"], []]
    assert [num for _, num in log] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4]
    learner.close()


def test_blocks_are_the_outermost_lists_with_sites() -> None:
    net = LayeredNet()
    assert find_blocks(net, ["second.0.query"]) == list(net.second)
    nested = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))])
    model = nn.Module()
    model.layers = nested
    assert find_blocks(model, ["layers.0.1.0"]) == list(nested)
    assert find_blocks(model, ["head"]) == [model]


@pytest.mark.parametrize(
    ("tensor", "num"),
    [(torch.zeros(3, 4), 12), (torch.zeros(3, 4).T, 12), (torch.zeros(3, 4)[:, 1:3], 10),
     (torch.zeros(3, 1).expand(3, 5), 3), (torch.zeros(()), 1)],
)  # fmt: skip
def test_memory_of_a_view_ends_with_its_last_element(tensor: Tensor, num: int) -> None:
    assert _span(tensor) == num * tensor.element_size()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lora"], r"model.cuda_graphs=true with method=lora: .*leave it out"),
        (["model=tiny-gpt2", "task=synthetic", "model.gradient_checkpointing=true"],
         "either replayed or recomputed"),
        (["model=tiny-gpt2", "task=dolly", "users=alone", "data_dir=builtin"],
         "users=alone and merge=unmerged: .*use merge=merged"),
    ],
)  # fmt: skip
def test_what_graphs_cannot_follow_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed("model.cuda_graphs=true", *overrides)


def test_graphs_need_a_gpu() -> None:
    config = composed("model.cuda_graphs=true", "device=cpu").config
    with pytest.raises(ConfigError, match=r"device=cpu: graphs are captured on a GPU; use device"):
        resolve_settings(config, Objective.image)
