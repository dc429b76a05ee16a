"""Truth is autograd: weights after several steps against plain back-propagation, in float64."""

import copy

import pytest

from cola.config.schema import AdapterKind, MergeMode
from tests import tiny
from tests.tolerances import EXACT

KINDS = list(AdapterKind)
NETS = {"net": tiny.TinyNet, "conv": tiny.TinyConv}


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("mode", list(MergeMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("net", NETS)
def test_weights_equal_autograd(
    net: str, kind: AdapterKind, mode: MergeMode, interval: int, name: str, offload: str
) -> None:
    if kind is AdapterKind.mlp and mode is MergeMode.merged:
        pytest.skip("Proposition 2: an mlp adapter cannot be merged (its refusal has a test)")
    base = tiny.net(NETS[net])
    start = tiny.filled_adapters(base, kind)
    stream = tiny.batches(base, 7)
    config = tiny.optimizer(name)
    oracle = tiny.oracle_learner(
        copy.deepcopy(base), start, optimizer_config=config, detached=mode is MergeMode.detached
    )
    wanted = tiny.train(oracle, stream, interval=interval)
    learner = tiny.gradient_learner(
        base, start, mode=mode, optimizer_config=config, offload=offload
    )
    found = tiny.train(learner, stream, interval=interval)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    assert found == pytest.approx(wanted, rel=EXACT)
    learner.close()
