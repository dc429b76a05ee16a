"""Adapters of equal shapes fitted in one product, as on a GPU: the same gradients and weights."""

import copy
import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cola import gradient_wiring
from cola.adaptation_data import AdaptationData
from cola.adapters import build_adapter
from cola.config.choices import AdapterKind, MergeMode
from cola.config.schema import AdapterConfig
from cola.gradient_learning import lowrank_gradients
from cola.gradient_wiring import build_gradient_learner
from cola.offload import batch_gradients, placing
from cola.offload.fit import Fit
from cola.offload.fitter import AdapterFitter
from cola.offload.placing import OffloadPlan
from cola.offload.product_replays import MAX_SHAPES, ProductReplays
from cola.sites import SiteKind, SiteSpec
from tests import tiny
from tests.rerun import Rerun
from tests.tolerances import EXACT
from tests.wires import LaggingTransfer

CPU = torch.device("cpu")


def fitter_of(
    shapes: dict[str, tuple[int, int, int]],
    *,
    stacks: bool,
    replays: ProductReplays | None = None,
) -> AdapterFitter:
    """Adapters by site, given (inputs, outputs, rank)."""
    adapters = {}
    for name, (inputs, outputs, rank) in shapes.items():
        spec = SiteSpec(name=name, kind=SiteKind.linear, in_features=inputs, out_features=outputs)
        adapter = build_adapter(AdapterConfig(kind=AdapterKind.lowrank, rank=rank), spec, seed=0)
        generator = torch.Generator().manual_seed(len(adapters))
        for parameter in adapter.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        adapters[name] = adapter.double()
    return AdapterFitter(
        adapters, tiny.optimizer(), scale=tiny.SCALE, stacks=stacks, replays=replays
    )


def deliveries(
    groups: Sequence[Sequence[str]], shapes: dict[str, tuple[int, int, int]], num_rows: int
) -> list[tuple[str, AdaptationData]]:
    """One hidden input for each group of sites."""
    generator = torch.Generator().manual_seed(num_rows)

    def draw(size: int) -> Tensor:
        return torch.randn(num_rows, size, generator=generator, dtype=torch.float64)

    batch = []
    for group in groups:
        x = draw(shapes[group[0]][0])
        batch += [
            (site, AdaptationData(hidden_input=x, hidden_gradient=draw(shapes[site][1])))
            for site in group
        ]
    return batch


SHAPES = {
    "0.q": (5, 4, 2), "0.v": (5, 4, 2), "1.q": (5, 4, 2), "1.v": (5, 4, 2),
    "2.q": (5, 4, 2), "2.v": (5, 3, 2),  # outputs differ, as with grouped queries
    "3.q": (5, 4, 3), "3.v": (5, 4, 3),  # another rank
}  # fmt: skip
GROUPS = [[f"{block}.q", f"{block}.v"] for block in range(4)]


def test_gradients_are_those_of_single_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    stacked = batch_gradients.stacked_lowrank_gradients

    def noted(adapters: Sequence[Sequence[object]], *arguments: object) -> object:
        sizes.append(len(adapters))
        return stacked(adapters, *arguments)

    monkeypatch.setattr(batch_gradients, "stacked_lowrank_gradients", noted)
    together, apart = (fitter_of(SHAPES, stacks=stacks) for stacks in (True, False))
    for num_rows in (7, 6):  # two batches of an interval
        batch = deliveries(GROUPS, SHAPES, num_rows)
        together.accumulate(batch)
        apart.accumulate(batch)
    for site in SHAPES:
        for found, wanted in zip(
            together.adapters[site].parameters(), apart.adapters[site].parameters(), strict=True
        ):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=EXACT, atol=EXACT)
            assert found.grad.is_contiguous()
    assert sizes == [2, 2]  # blocks 0 and 1, in both batches


def test_a_gradient_belongs_to_one_adapter_alone() -> None:
    """They are parts of one tensor: a step of one must not change another's."""
    shapes = {name: SHAPES[name] for name in ("0.q", "0.v", "1.q", "1.v")}
    fitter = fitter_of(shapes, stacks=True)
    (first, *rest) = deliveries(GROUPS[:2], shapes, 5)
    fitter.accumulate([first, *rest])
    before = fitter.adapters["1.v"].lora_a.grad.clone()
    fitter.accumulate([first])
    assert torch.equal(fitter.adapters["1.v"].lora_a.grad, before)
    wanted = lowrank_gradients(
        [fitter.adapters["0.q"]], first[1].hidden_input, [first[1].hidden_gradient], tiny.SCALE
    )
    found = fitter.adapters["0.q"].lora_a.grad
    torch.testing.assert_close(found, 2 * wanted[0]["lora_a"], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("interval", [1, 2])
def test_replayed_products_take_the_steps_of_plain_ones(interval: int) -> None:
    """Two fitters of one worker, whose products read the same memory one after the other."""
    capturer = Rerun()
    replays = ProductReplays(capturer)
    halves = [{name: SHAPES[name] for group in half for name in group} for half in
              (GROUPS[:2], GROUPS[2:])]  # fmt: skip
    halves[1]["2.v"] = halves[1]["2.q"]
    halves[1] |= dict.fromkeys(("3.q", "3.v"), halves[1]["2.q"])
    together = [fitter_of(half, stacks=True, replays=replays) for half in halves]
    apart = [fitter_of(half, stacks=False) for half in halves]
    all_rows = [7, 7, 6, 7, 6, 7, 7, 6, 7, 6] * interval
    for index, num_rows in enumerate(all_rows):
        for half, groups, fitters in zip(
            halves, (GROUPS[:2], GROUPS[2:]), zip(together, apart, strict=True), strict=True
        ):
            batch = deliveries(groups, half, num_rows)
            for fitter in fitters:
                fitter.accumulate(batch)
                if (index + 1) % interval == 0:
                    fitter.step(Fit(number=index, learning_rate=0.1, gradient_scale=1.0))
    for replayed, plain in zip(together, apart, strict=True):
        for site, adapter in replayed.adapters.items():
            found, wanted = tiny.flat(adapter), tiny.flat(plain.adapters[site])
            torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)
    assert capturer.num_captures == 2 * 2, "fitters and numbers of rows"
    # The first batch of an interval is replayed, from the second of its shape on.
    assert capturer.num_replays == 2 * (10 - 2)


def test_inputs_and_gradients_of_one_shape_do_not_share_memory() -> None:
    shapes = {"0.o": (5, 5, 2), "1.o": (5, 5, 2)}
    replayed = fitter_of(shapes, stacks=True, replays=ProductReplays(Rerun()))
    plain = fitter_of(shapes, stacks=False)
    for _ in range(3):
        for fitter in (replayed, plain):
            fitter.accumulate(deliveries([["0.o"], ["1.o"]], shapes, 7))
            fitter.step(Fit(number=1, learning_rate=0.1, gradient_scale=1.0))
    for site, adapter in replayed.adapters.items():
        found, wanted = tiny.flat(adapter), tiny.flat(plain.adapters[site])
        torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)


def test_shapes_that_keep_changing_are_not_captured_without_end() -> None:
    capturer = Rerun()
    shapes = {name: SHAPES[name] for name in ("0.q", "0.v", "1.q", "1.v")}
    fitter = fitter_of(shapes, stacks=True, replays=ProductReplays(capturer))
    for _ in range(3):
        for num_rows in range(1, MAX_SHAPES + 4):
            fitter.accumulate(deliveries(GROUPS[:2], shapes, num_rows))
            fitter.step(Fit(number=1, learning_rate=0.1, gradient_scale=1.0))
    assert capturer.num_captures == MAX_SHAPES


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
@pytest.mark.parametrize("net", [tiny.TinyNet, tiny.CheckpointedNet])
def test_weights_equal_autograd_when_data_is_gathered(
    monkeypatch: pytest.MonkeyPatch, net: type[torch.nn.Module], mode: MergeMode, interval: int
) -> None:
    group = placing.Group
    monkeypatch.setattr(placing, "Transfer", LaggingTransfer)
    monkeypatch.setattr(placing, "Group", lambda **facts: group(**{**facts, "gathers": True}))
    monkeypatch.setattr(
        gradient_wiring, "AdapterFitter", functools.partial(AdapterFitter, stacks=True)
    )
    monkeypatch.setattr(gradient_wiring, "_formers", lambda *arguments: {})
    base, plain = tiny.net(net), tiny.net(tiny.TinyNet)
    start, stream = tiny.filled_adapters(base, AdapterKind.lowrank), tiny.batches(base, 5)
    oracle = tiny.oracle_learner(plain, start)
    tiny.train(oracle, stream, interval=interval)
    learner = build_gradient_learner(
        base, tiny.specs(base), copy.deepcopy(start),
        tiny.settings(mode=mode, offload=OffloadPlan(devices=(CPU,), workers=1)),
    )  # fmt: skip
    tiny.train(learner, stream, interval=interval)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()
