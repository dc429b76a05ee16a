"""Truth is autograd: weights after several steps against plain back-propagation, in float64."""

import copy
import functools
import weakref

import pytest
from torch import Tensor

from cola.adapters import Adapter
from cola.config.choices import AdapterKind, MergeMode
from cola.sites import SiteName
from tests import tiny
from tests.tolerances import EXACT

NETS = {"net": tiny.TinyNet, "conv": tiny.TinyConv}
NUM_STEPS = 7  # leaves a partial interval at 2 and at 3


@functools.cache
def initial(net: str, kind: AdapterKind) -> dict[SiteName, Adapter]:
    """Shared by all cases, which copy it."""
    return tiny.filled_adapters(tiny.net(NETS[net]), kind)


@functools.cache
def truth(
    net: str, kind: AdapterKind, detached: bool, interval: int, name: str
) -> tuple[dict[SiteName, Adapter], list[float]]:
    """Weights and losses of the oracle, which neither merging nor offloading concerns."""
    base, start = tiny.net(NETS[net]), initial(net, kind)
    config = tiny.optimizer(name)
    oracle = tiny.oracle_learner(base, start, optimizer_config=config, detached=detached)
    losses = tiny.train(oracle, tiny.batches(base, NUM_STEPS), interval=interval)
    return copy.deepcopy(dict(oracle.export())), losses


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("kind", "mode"), [pytest.param(k, m, id=f"{k.name}-{m.name}") for k, m in tiny.ALLOWED]
)
@pytest.mark.parametrize(
    ("net", "interval"),
    [
        *(("net", interval) for interval in (1, 2, 3)),
        ("conv", 2),
        *(pytest.param("conv", interval, marks=pytest.mark.slow) for interval in (1, 3)),
    ],
)
def test_weights_equal_autograd(
    net: str, kind: AdapterKind, mode: MergeMode, interval: int, name: str, offload: str
) -> None:
    wanted, losses = truth(net, kind, mode is MergeMode.detached, interval, name)
    base, start = tiny.net(NETS[net]), initial(net, kind)
    learner = tiny.gradient_learner(
        base, start, mode=mode, optimizer_config=tiny.optimizer(name), offload=offload
    )
    found = tiny.train(learner, tiny.batches(base, NUM_STEPS), interval=interval)
    assert tiny.distance(learner.export(), wanted, start) <= EXACT
    assert found == pytest.approx(losses, rel=EXACT)
    learner.close()


@pytest.mark.parametrize("method", ["cola", "autograd"])
def test_logits_are_gone_when_hidden_gradients_come(method: str) -> None:
    """Logits of a language model are among the largest tensors of a step."""
    logits: list[weakref.ref[Tensor]] = []
    was_there: list[bool] = []

    class Watched(tiny.TinyNet):
        def forward(self, features: Tensor) -> tiny.Output:
            output = super().forward(features)
            logits.append(weakref.ref(output.logits))
            return output

    base = tiny.net(Watched)
    base.get_submodule("query").register_forward_hook(
        lambda module, args, hidden: (
            hidden.requires_grad_().register_hook(
                lambda gradient: was_there.append(logits[-1]() is not None)
            )
            and None
        )
    )
    start = tiny.filled_adapters(base, AdapterKind.linear)
    build = tiny.gradient_learner if method == "cola" else tiny.oracle_learner
    tiny.train(build(base, start), tiny.batches(base, 2))
    assert was_there == [False, False]
