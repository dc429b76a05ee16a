"""The same equivalence with the base model on a GPU and fits on the host: real streams."""

import copy

import pytest
import torch

from cola.config.choices import AdapterKind, MergeMode
from tests import tiny
from tests.tolerances import EXACT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
@pytest.mark.parametrize("kind", [AdapterKind.lowrank, AdapterKind.linear], ids=lambda k: k.name)
@pytest.mark.parametrize("net", [tiny.TinyNet, tiny.TinyConv])
def test_weights_equal_autograd_on_gpu(
    net: type[torch.nn.Module], kind: AdapterKind, mode: MergeMode, interval: int, offload: str
) -> None:
    base = tiny.net(net).cuda()
    start = tiny.filled_adapters(base, kind)
    stream = [batch.to(torch.device("cuda")) for batch in tiny.batches(base, 40)]
    oracle = tiny.oracle_learner(copy.deepcopy(base), {k: a.cuda() for k, a in start.items()})
    tiny.train(oracle, stream, interval=interval)
    start = {site: adapter.cpu() for site, adapter in start.items()}
    learner = tiny.gradient_learner(base, start, mode=mode, offload=offload)
    tiny.train(learner, stream, interval=interval)
    found = {site: copy.deepcopy(adapter).cpu() for site, adapter in learner.export().items()}
    wanted = {site: copy.deepcopy(adapter).cpu() for site, adapter in oracle.export().items()}
    assert tiny.distance(found, wanted, start) <= EXACT
    learner.close()
