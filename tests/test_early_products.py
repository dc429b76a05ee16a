"""What a host multiplies while gradients are still to come: used once, and only where it fits."""

import copy

import pytest
import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.config.choices import AdapterKind
from cola.errors import OffloadError
from cola.gradient_learner import GradientLearner
from cola.gradient_learning import inner_products
from cola.offload import batch_gradients, placing
from cola.offload.fit import Fit
from cola.offload.fitter import AdapterFitter
from cola.offload.outbox import PREPARED_BYTES, Outbox
from cola.offload.transfer import Transfer
from cola.sites import SiteSpec
from tests import tiny
from tests.layered import LayeredNet
from tests.tolerances import EXACT
from tests.wires import LaggingTransfer

LOWRANK = AdapterKind.lowrank
SITES = ("query", "value")


class Counted:
    """Stands in for `inner_products`, wherever it is called from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.early: list[int] = []
        self.late: list[int] = []
        for module, calls in (
            ("offload.batch_gradients", self.early),
            ("gradient_learning", self.late),
        ):
            monkeypatch.setattr(
                f"cola.{module}.inner_products",
                lambda adapters, x, calls=calls: [
                    calls.append(len(adapters)),
                    inner_products(adapters, x),
                ][1],
            )


def fitters(kind: AdapterKind = LOWRANK) -> tuple[AdapterFitter, AdapterFitter]:
    """Two alike, of query and value."""
    specs = tiny.specs(tiny.net())
    own = {s: tiny.filled_adapter(kind, specs[s], seed=i) for i, s in enumerate(SITES)}
    one, other = (
        AdapterFitter(copy.deepcopy(own), tiny.optimizer(), scale=tiny.SCALE) for _ in range(2)
    )
    return one, other


def batch(x: Tensor, seed: int = 0) -> list[tuple[str, AdaptationData]]:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(len(x), 5, generator=generator, dtype=x.dtype) for _ in SITES]
    # Gradients come last to first.
    return [
        (site, AdaptationData(hidden_input=x, hidden_gradient=g))
        for site, g in zip(reversed(SITES), gradients, strict=True)
    ]


def rows(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(fitter: AdapterFitter, number: int) -> None:
    fitter.step(Fit(number=number, learning_rate=0.1, gradient_scale=1.0))


def same(one: AdapterFitter, other: AdapterFitter) -> bool:
    return all(
        torch.allclose(tiny.flat(one.adapters[s]), tiny.flat(other.adapters[s]), rtol=0, atol=1e-15)
        for s in SITES
    )


def test_prepared_products_are_used_once_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared, plain = fitters()
    counted = Counted(monkeypatch)
    for number in (1, 2):  # the second with other parameters
        x = rows(number)
        prepared.prepare([(site, x) for site in SITES])
        assert counted.early == [2] * number, "one product for both"
        prepared.accumulate(batch(x, number))
        assert not counted.late
        step(prepared, number)
    prepared.accumulate(batch(x))
    assert counted.late == [2], "of an interval's next batch nothing was prepared"
    for number in (1, 2):
        plain.accumulate(batch(rows(number), number))
        step(plain, number)
    plain.accumulate(batch(x))
    for fitter in (prepared, plain):
        step(fitter, 3)
    assert same(prepared, plain)


@pytest.mark.parametrize("which", ["another input", "one site"])
def test_what_was_prepared_of_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    prepared, plain = fitters()
    x, counted = rows(), Counted(monkeypatch)
    if which == "one site":
        prepared.prepare([("query", x)])
    else:
        prepared.prepare([(site, x.clone()) for site in SITES])
    for fitter in (prepared, plain):
        fitter.accumulate(batch(x))
        step(fitter, 1)
    assert counted.late == [2, 2]
    assert same(prepared, plain)


@pytest.mark.parametrize("kind", [AdapterKind.linear, AdapterKind.mlp])
def test_other_adapters_make_no_tasks(monkeypatch: pytest.MonkeyPatch, kind: AdapterKind) -> None:
    """A worker should not wake up to do nothing."""
    counted = Counted(monkeypatch)
    learner = learners(monkeypatch, 0, kind)
    monkeypatch.setattr(AdapterFitter, "prepare", lambda self, inputs: counted.early.append(0))
    tiny.train(learner, tiny.batches(tiny.net(LayeredNet), 2))
    learner.export()
    learner.close()
    assert not counted.early


def test_low_rank_sites_of_a_block_are_prepared_without_the_others() -> None:
    transfer = LaggingTransfer(torch.device("cpu"), torch.device("cpu"))
    outbox = Outbox([["query", "value", "out"], ["up"]], transfer, ["query", "value"])
    parcel = lambda: torch.zeros(1)  # noqa: E731
    size = PREPARED_BYTES
    assert outbox.add_input("query", parcel, size) == []
    assert outbox.add_input("out", parcel, size) == []
    assert outbox.add_input("value", parcel, size) == [("query", parcel), ("value", parcel)]
    assert outbox.add_input("up", parcel, size) == []
    assert outbox.add_input("query", parcel, size) == [], "a block's next inputs"
    assert outbox.add_input("value", parcel, size - 1) == [], "not worth a task"


def test_the_next_forward_pass_waits_for_what_is_always_prepared() -> None:
    transfer = LaggingTransfer(torch.device("cpu"), torch.device("cpu"))
    outbox = Outbox([["query"]], transfer, ["query"], is_first=True)
    parcel = lambda: torch.zeros(1)  # noqa: E731
    assert outbox.add_input("query", parcel, 1) == [("query", parcel)]


def test_where_data_is_at_hand_nothing_is_prepared() -> None:
    here = torch.device("cpu")
    outbox = Outbox([["query"]], Transfer(here, here), ["query"])
    assert outbox.add_input("query", lambda: torch.zeros(1), PREPARED_BYTES) == []


def test_data_that_is_multiplied_in_another_type_is_not_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would be converted once more."""
    counted = Counted(monkeypatch)
    monkeypatch.setattr(batch_gradients, "product_dtype", lambda values, master: master)
    fitters()[0].prepare([(site, rows(dtype=torch.bfloat16)) for site in SITES])
    assert not counted.early


def learners(
    monkeypatch: pytest.MonkeyPatch, threshold: int, kind: AdapterKind = LOWRANK
) -> GradientLearner:
    monkeypatch.setattr(placing, "Transfer", LaggingTransfer)
    monkeypatch.setattr("cola.offload.outbox.PREPARED_BYTES", threshold)
    base = tiny.net(LayeredNet)
    return tiny.gradient_learner(base, tiny.filled_adapters(base, kind), offload="cpu")


@pytest.mark.parametrize(("threshold", "num"), [(0, 10), (1, 10), (1 << 20, 1)])
def test_a_learner_prepares_large_inputs_and_the_first_block_by_block(
    monkeypatch: pytest.MonkeyPatch, threshold: int, num: int
) -> None:
    """Ten inputs in every step: two of each layer, the gates' (the first) and the head's."""
    counted = Counted(monkeypatch)
    learner = learners(monkeypatch, threshold)
    base = tiny.net(LayeredNet)
    start = tiny.filled_adapters(base, LOWRANK)
    oracle = tiny.oracle_learner(base, start)
    stream = tiny.batches(base, 4)
    tiny.train(oracle, stream)
    tiny.train(learner, stream)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()
    assert len(counted.early) == len(stream) * num


def test_what_goes_wrong_early_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learners(monkeypatch, 0)

    def fail(fitter: AdapterFitter, inputs: list[tuple[str, Tensor]]) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(AdapterFitter, "prepare", fail)
    with pytest.raises(OffloadError, match=r"fitting site '.*' failed:[\s\S]*no memory"):
        tiny.train(learner, tiny.batches(tiny.net(LayeredNet), 2))
    learner.close()


def test_sites_of_convolutions_have_nothing_to_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    spec: SiteSpec = tiny.site("conv2d").spec
    fitter = AdapterFitter(
        {spec.name: tiny.filled_adapter(LOWRANK, spec)}, tiny.optimizer(), scale=tiny.SCALE
    )
    assert not fitter.can_prepare(spec.name)
    fitter.prepare([(spec.name, tiny.site("conv2d").hidden_input)])
    assert not counted.early
