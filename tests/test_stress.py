"""Delays at every hand-over between base model and workers must not change a single weight."""

import copy
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from cola.bank import Bank
from cola.config.choices import AdapterKind, MergeMode
from cola.interfaces import Adaptation
from cola.merging import Merger
from cola.offload import placing
from cola.offload.fitter import AdapterFitter
from cola.offload.fleet import Fleet
from cola.offload.transfer import Transfer
from tests import tiny
from tests.tolerances import EXACT
from tests.wires import LaggingTransfer

MAX_DELAY_SECONDS = 0.003
HANDOVERS = [
    (Transfer, "ship"),
    (Fleet, "close"),  # a delay after it lets a fit overtake the site's own product with W
    (AdapterFitter, "prepare"),
    (AdapterFitter, "accumulate"),
    (AdapterFitter, "step"),
    (Bank, "publish_all"),
    (Merger, "publish_all"),
]
NUM_STEPS = 9


def delay_handovers(monkeypatch: pytest.MonkeyPatch, generator: random.Random) -> None:
    lock = threading.Lock()

    def pause() -> None:
        with lock:
            # Most are short: long ones together would only line everything up again.
            seconds = MAX_DELAY_SECONDS * generator.random() ** 4
        time.sleep(seconds)

    def delayed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            pause()
            result = call(*args, **kwargs)
            pause()
            return result

        return run

    for owner, name in HANDOVERS:
        monkeypatch.setattr(owner, name, delayed(getattr(owner, name)))


@pytest.mark.parametrize(("net", "num_workers"), [(tiny.TinyNet, 3), (tiny.CheckpointedNet, 2)])
@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
@pytest.mark.parametrize(
    "wire",
    [pytest.param(Transfer, id="at once", marks=pytest.mark.slow),
     pytest.param(LaggingTransfer, id="late")],
)  # fmt: skip
def test_weights_equal_autograd_whatever_the_delays(
    monkeypatch: pytest.MonkeyPatch,
    wire: type[Transfer],
    mode: MergeMode,
    interval: int,
    net: type[nn.Module],
    num_workers: int,
) -> None:
    plain, base = tiny.net(tiny.TinyNet), tiny.net(net)
    start, stream = tiny.filled_adapters(base, AdapterKind.lowrank), tiny.batches(base, NUM_STEPS)
    oracle = tiny.oracle_learner(plain, start)
    tiny.train(oracle, stream, interval=interval)

    case = f"{mode.name} {interval} {net.__name__}"
    delay_handovers(monkeypatch, random.Random(case))
    monkeypatch.setattr(placing, "Transfer", wire)
    monkeypatch.setattr("cola.offload.outbox.PREPARED_BYTES", 0)
    chances = random.Random(case)  # apart from the delays, whose order is the threads'
    learner = tiny.gradient_learner(
        base, start, mode=mode, offload="cpu", num_workers=num_workers,
        evaluate_merged=chances.choice([None, True, False]),
    )  # fmt: skip
    for step, batch in enumerate(stream, start=1):
        number = -(-step // interval)
        closes = step % interval == 0 or step == NUM_STEPS
        closing = Adaptation(number=number, learning_rate=0.05 / number) if closes else None
        learner.record(batch, closing)
        if closing:
            learner.update(closing)
        if chances.random() < 0.2:
            tiny.logits(learner, batch)
        if chances.random() < 0.2:
            learner.load_state_dict(copy.deepcopy(learner.state_dict()))
        if chances.random() < 0.2:
            learner.measure()
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()
    assert all((a == b).all() for a, b in zip(base.parameters(), plain.parameters(), strict=True))
