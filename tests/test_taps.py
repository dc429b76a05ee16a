"""Taps: what leaves a site, when parameters are installed, and that nothing else changes."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cola.adaptation_data import AdaptationData, Parcel
from cola.adapters import Adapter
from cola.config.choices import AdapterKind, MergeMode, Objective
from cola.errors import SiteError
from cola.interfaces import Adaptation
from cola.kept_rows import KeptRows
from cola.merging import Merger
from cola.objectives import task_loss
from cola.site_calls import SiteRun
from cola.sites import SiteName, flatten_rows
from cola.taps import Taps
from cola.task_data import Batch
from cola.user_rows import UserRows
from tests import tiny
from tests.tolerances import EXACT

LOWRANK = AdapterKind.lowrank
CALLS = {"query": 1, "value": 1, "twist": 1, "again": 2, "head": 1}
EXACT_MODES = [MergeMode.unmerged, MergeMode.merged]

by_exact_mode = pytest.mark.parametrize("mode", EXACT_MODES, ids=lambda mode: mode.name)
by_offload = pytest.mark.parametrize("offload", ["none", "cpu"])
by_net = pytest.mark.parametrize("net", [tiny.TinyNet, tiny.CheckpointedNet])


class Probe:
    """Sink and source of one base model in merged mode; notes every event and its phase.

    The source does not wait for a version to be asked for: it gives the newest, as a fleet would
    that has finished its fits already. `on_close` runs inside the backward pass.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[SiteName, Adapter]) -> None:
        self.base = base
        self.adapters = adapters
        self.merger = Merger(base, tiny.specs(base), scale=tiny.SCALE)
        self.taps = Taps(base, tiny.specs(base), placement=self.merger, sink=self, source=self)
        self.phase = "idle"
        self.events: list[tuple[str, SiteName, str]] = []
        self.data: dict[SiteName, list[AdaptationData]] = {}
        self.on_close: Callable[[], None] = lambda: None
        self.leaves_early = False

    def takes_early(self, site: SiteName) -> bool:
        return self.leaves_early

    def send_inputs(self, runs: Sequence[SiteRun]) -> list[Parcel]:
        return [self.send_input(run) for run in runs]

    def send_input(self, run: SiteRun) -> Parcel:
        self.events.append(("send", run.site, self.phase))
        copy = run.hidden_input.detach().to(run.dtype).clone()
        rows = flatten_rows(copy, self.taps._sites[run.site])
        return lambda: rows

    def put(
        self,
        site: SiteName,
        hidden_input: Parcel,
        hidden_gradient: Tensor,
        kept: KeptRows | None,
        rows: UserRows | None,
    ) -> None:
        self.events.append(("put", site, self.phase))
        gradient = flatten_rows(hidden_gradient, self.taps._sites[site])
        found = AdaptationData(hidden_input=hidden_input(), hidden_gradient=gradient)
        self.data.setdefault(site, []).append(found)

    def ready(self, sites: Iterable[SiteName], version: int) -> list[SiteName]:
        return list(sites)

    def close(self, site: SiteName) -> None:
        self.events.append(("close", site, self.phase))
        self.on_close()

    def wait(self, sites: Iterable[SiteName], version: int) -> dict[SiteName, Mapping[str, Tensor]]:
        sites = list(sites)
        self.events += [("install", site, self.phase) for site in sites]
        return {site: self.merger.publish(self.adapters[site]) for site in sites}

    def step(self, batch: Batch, version: int = 0) -> None:
        with self.taps.recording(version) as begin_backward:
            self.phase = "forward"
            loss = task_loss(Objective.classification, self.base(**batch.inputs).logits, batch)
            begin_backward()
            self.phase = "backward"
            loss.backward()
        self.phase = "idle"

    def phases(self, kind: str) -> set[str]:
        return {phase for event, _, phase in self.events if event == kind}


def probe(net: type[nn.Module]) -> tuple[Probe, Batch]:
    base = tiny.net(net)
    return Probe(base, tiny.filled_adapters(base, LOWRANK)), tiny.batches(base, 1)[0]


@by_net
def test_every_call_is_put_once_and_its_site_closed_once_after_it(net: type[nn.Module]) -> None:
    taken, batch = probe(net)
    for version in (0, 1):
        taken.events.clear()
        taken.step(batch, version)
        assert Counter(site for event, site, _ in taken.events if event == "put") == CALLS
        for site in CALLS:
            last = [event for event, name, _ in taken.events if name == site]
            assert last.count("close") == 1
            assert last[-1] == "close"


@by_net
def test_data_are_rows_of_the_hidden_input_and_its_gradient(net: type[nn.Module]) -> None:
    taken, batch = probe(net)
    taken.step(batch)
    (query,), (value,) = taken.data["query"], taken.data["value"]
    assert torch.equal(query.hidden_input, batch.inputs["features"].reshape(-1, 6))
    assert torch.equal(value.hidden_input, query.hidden_input)
    assert query.hidden_gradient.shape == (query.hidden_input.shape[0], 5)


@by_net
def test_parameters_are_installed_once_per_version_in_the_forward_pass(
    net: type[nn.Module],
) -> None:
    taken, batch = probe(net)
    for version in (0, 0, 1, 1, 2):
        taken.step(batch, version)
    installs = Counter(site for event, site, _ in taken.events if event == "install")
    assert installs == dict.fromkeys(CALLS, 3)
    assert taken.phases("install") == {"forward"}
    assert taken.phases("put") == taken.phases("close") == {"backward"}


@by_net
def test_hidden_gradients_do_not_see_parameters_that_are_ready_too_early(
    net: type[nn.Module],
) -> None:
    quiet, batch = probe(net)
    quiet.step(batch)
    eager, _ = probe(net)

    def finish_every_fit_now() -> None:
        for adapter in eager.adapters.values():
            nn.init.ones_(adapter.get_parameter("lora_b"))
        eager.taps.forget()  # the next forward pass installs, whatever the version

    eager.on_close = finish_every_fit_now
    eager.step(batch)
    assert eager.phases("install") == {"forward"}
    for site, batches in quiet.data.items():
        for wanted, found in zip(batches, eager.data[site], strict=True):
            assert torch.equal(found.hidden_gradient, wanted.hidden_gradient), site
    eager.events.clear()
    eager.step(batch)
    assert Counter(site for event, site, _ in eager.events if event == "install") == dict.fromkeys(
        CALLS, 1
    )


def test_a_forward_pass_outside_a_step_neither_installs_nor_records() -> None:
    taken, batch = probe(tiny.TinyNet)
    taken.base(**batch.inputs)
    assert taken.events == []
    taken.step(batch)
    taken.events.clear()
    taken.taps.forget()
    taken.base(**batch.inputs).logits.requires_grad_().sum().backward()
    assert taken.events == []


def test_a_failed_forward_pass_leaves_the_taps_idle() -> None:
    taken, batch = probe(tiny.TinyNet)
    features = torch.zeros(2, 3, dtype=torch.float64)
    broken = Batch(inputs={"features": features}, labels=batch.labels, num_terms=2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        taken.step(broken)
    taken.events.clear()
    taken.base(**batch.inputs)
    assert taken.events == []


def test_checkpointing_frees_hidden_inputs_until_they_are_recomputed() -> None:
    alive = {}
    for net in (tiny.TinyNet, tiny.CheckpointedNet):
        taken, batch = probe(net)
        inputs: list[StorageWeakRef] = []
        handle = taken.base.get_submodule("twist").register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(
                StorageWeakRef(args[0].untyped_storage())
            )
        )
        with taken.taps.recording(0):
            loss = taken.base(**batch.inputs).logits.sum()
            alive[net] = not inputs[0].expired()
        handle.remove()
        del loss
    assert alive == {tiny.TinyNet: True, tiny.CheckpointedNet: False}


@pytest.mark.parametrize("kind", [AdapterKind.lowrank, AdapterKind.mlp], ids=lambda k: k.name)
@pytest.mark.parametrize("interval", [1, 2])
@by_offload
def test_checkpointed_net_unmerged_equals_autograd(
    offload: str, interval: int, kind: AdapterKind
) -> None:
    check_checkpointed(MergeMode.unmerged, kind, offload, interval)


@pytest.mark.parametrize("interval", [1, 2])
@by_offload
def test_checkpointed_net_merged_equals_autograd(offload: str, interval: int) -> None:
    check_checkpointed(MergeMode.merged, LOWRANK, offload, interval)


def check_checkpointed(mode: MergeMode, kind: AdapterKind, offload: str, interval: int) -> None:
    plain, base = tiny.net(tiny.TinyNet), tiny.net(tiny.CheckpointedNet)
    start, stream = tiny.filled_adapters(base, kind), tiny.batches(base, 5)
    oracle = tiny.oracle_learner(plain, start)
    wanted = tiny.train(oracle, stream, interval=interval)
    learner = tiny.gradient_learner(base, start, mode=mode, offload=offload)
    assert tiny.train(learner, stream, interval=interval) == pytest.approx(wanted, rel=EXACT)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@by_exact_mode
def test_reentrant_checkpointing_is_refused(mode: MergeMode) -> None:
    base = tiny.net(tiny.ReentrantNet)
    learner = tiny.gradient_learner(base, tiny.filled_adapters(base, LOWRANK), mode=mode)
    with pytest.raises(SiteError, match=r"site 'query' .*reentrant.*non-reentrant"):
        tiny.train(learner, tiny.batches(base, 1))
    learner.close()


class SilentNet(tiny.TinyNet):
    """Has a site that its forward pass never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


def test_a_site_that_never_runs_is_named() -> None:
    base = tiny.net(SilentNet)
    learner = tiny.gradient_learner(base, tiny.filled_adapters(base, LOWRANK))
    with pytest.raises(SiteError, match=r"sites \['unused'\] \(1 of 6\) did not run"):
        tiny.train(learner, tiny.batches(base, 1))
    learner.close()


@by_exact_mode
@by_offload
def test_calls_of_a_shared_module_add_up(offload: str, mode: MergeMode) -> None:
    base = tiny.net()
    start, (batch,) = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 1)
    oracle = tiny.oracle_learner(copy.deepcopy(base), start)
    oracle.record(batch, None)
    learner = tiny.gradient_learner(base, start, mode=mode, offload=offload)
    learner.record(batch, None)
    found, wanted = learner.export()["again"], oracle.export()["again"]
    for parameter, true in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, true.grad, rtol=EXACT, atol=0)
    learner.close()


class KeywordNet(tiny.TinyNet):
    """Calls a site by keyword, as some Hugging Face models do."""

    def forward(self, features: Tensor) -> tiny.Output:
        x = torch.tanh(self.query(input=features)) * self.value(input=features)
        x = torch.tanh(self.twist(x))
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        return tiny.Output(self.head(input=x.mean(dim=1)))


def test_a_site_called_by_keyword_is_tapped() -> None:
    plain, base = tiny.net(), tiny.net(KeywordNet)
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 2)
    oracle, learner = tiny.oracle_learner(plain, start), tiny.gradient_learner(base, start)
    for each in (oracle, learner):
        tiny.train(each, stream)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()


IN_PLACE = [(net, mode) for net in (tiny.InPlaceNet, tiny.InPlaceViewNet) for mode in EXACT_MODES]


@pytest.mark.parametrize(("net", "mode"), IN_PLACE)
@by_offload
def test_in_place_operations_after_a_site_work(
    offload: str, net: type[nn.Module], mode: MergeMode
) -> None:
    base = tiny.net(net)
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 3)
    oracle = tiny.oracle_learner(copy.deepcopy(base), start)
    tiny.train(oracle, stream)
    learner = tiny.gradient_learner(base, start, mode=mode, offload=offload)
    tiny.train(learner, stream)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()


@by_exact_mode
@by_offload
def test_statistics_of_a_frozen_base_do_not_move(offload: str, mode: MergeMode) -> None:
    base = tiny.net(tiny.TinyConv)
    before = copy.deepcopy(dict(base.named_buffers()))
    assert before, "a net without BatchNorm would show nothing"
    stream = tiny.batches(base, 3)
    learner = tiny.gradient_learner(
        base, tiny.filled_adapters(base, LOWRANK), mode=mode, offload=offload
    )
    for number, batch in enumerate(stream, start=1):
        tiny.adapt(learner, batch, number)
        tiny.logits(learner, batch)
    learner.close()
    for name, buffer in base.named_buffers():
        assert torch.equal(buffer, before[name]), name


class NoisyNet(tiny.TinyNet):
    """Dropout tells training from evaluation."""

    def forward(self, features: Tensor) -> tiny.Output:
        return super().forward(nn.functional.dropout(features, 0.5, training=self.training))


@by_exact_mode
@by_offload
def test_evaluation_between_steps_changes_nothing(offload: str, mode: MergeMode) -> None:
    base = tiny.net(NoisyNet)
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 5)
    found = []
    for evaluates in (False, True):
        model = copy.deepcopy(base)
        learner = tiny.gradient_learner(model, start, mode=mode, offload=offload)
        for step, batch in enumerate(stream, start=1):
            number = -(-step // 2)
            closing = Adaptation(number=number, learning_rate=0.05) if step % 2 == 0 else None
            torch.manual_seed(step)
            learner.record(batch, closing)
            if closing:
                learner.update(closing)
            if evaluates:
                first, second = (tiny.logits(learner, batch) for _ in range(2))
                assert torch.equal(first, second), "dropout ran in evaluation"
                assert model.training
        found.append(torch.cat([tiny.flat(adapter) for adapter in learner.export().values()]))
        learner.close()
    assert torch.equal(*found)


def test_evaluation_sees_the_newest_parameters() -> None:
    base = tiny.net()
    start, stream = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 2)
    oracle = tiny.oracle_learner(copy.deepcopy(base), start)
    learner = tiny.gradient_learner(base, start, offload="cpu")
    for each in (oracle, learner):
        tiny.train(each, stream)
    wanted = tiny.logits(oracle, stream[0])
    torch.testing.assert_close(tiny.logits(learner, stream[0]), wanted, rtol=EXACT, atol=EXACT)
    learner.close()


@pytest.mark.parametrize("mode", list(MergeMode), ids=lambda mode: mode.name)
def test_closing_leaves_the_base_model_as_it_was_found(mode: MergeMode) -> None:
    base = tiny.net()
    before = copy.deepcopy(base.state_dict())
    learner = tiny.gradient_learner(base, tiny.filled_adapters(base, LOWRANK), mode=mode)
    assert base.get_submodule("query")._forward_hooks
    tiny.train(learner, tiny.batches(base, 3))
    learner.close()
    for module in base.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@by_offload
def test_detached_mode_loses_gradient_upstream_and_nothing_else(offload: str) -> None:
    base = tiny.net()
    start, (batch,) = tiny.filled_adapters(base, LOWRANK), tiny.batches(base, 1)
    gradients: dict[str, dict[SiteName, Tensor]] = {}
    learners = {
        "true": tiny.oracle_learner(copy.deepcopy(base), start),
        "stopped": tiny.oracle_learner(copy.deepcopy(base), start, detached=True),
        "found": tiny.gradient_learner(base, start, mode=MergeMode.detached, offload=offload),
    }
    for name, learner in learners.items():
        learner.record(batch, None)
        gradients[name] = {
            site: torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
            for site, adapter in learner.export().items()
        }
        learner.close()
    for site in start:
        true, stopped, found = (gradients[name][site] for name in ("true", "stopped", "found"))
        assert (found - stopped).norm() <= EXACT * stopped.norm()
        lost = ((found - true).norm() / true.norm()).item()
        assert lost <= EXACT if site == "head" else lost > 0.05, (site, lost)
