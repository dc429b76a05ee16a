"""`optimizer.head_lr`: new heads at a learning rate of their own, with every learner."""

from pathlib import Path

import pytest
import torch

from tests.runs import CONSTANT_RATE, Run, run, small_synthetic

ONE_SGD_STEP = (
    "task=synthetic",
    *CONSTANT_RATE,
    "trainer.max_steps=1",
    "optimizer.name=sgd",
    "optimizer.momentum=0",
    "optimizer.nesterov=false",
    "optimizer.weight_decay=0",
    "optimizer.lr=0.01",
)


@pytest.mark.parametrize(
    "method",
    [
        "adapter=lowrank",
        pytest.param("offload=cpu", marks=pytest.mark.slow),
        pytest.param("method=lora", marks=pytest.mark.slow),
    ],
)
def test_a_head_moves_at_its_own_rate_and_the_rest_does_not(tmp_path: Path, method: str) -> None:
    def moved(name: str, *overrides: str) -> Run:
        with small_synthetic():
            return run(tmp_path / name, *ONE_SGD_STEP, method, *overrides)

    plain, fast = moved("plain").adapters, moved("fast", "optimizer.head_lr=0.08").adapters
    for name, value in plain.items():
        assert value.abs().max() > 0
        factor = 8 if name.startswith("classifier") else 1
        torch.testing.assert_close(fast[name], factor * value, rtol=1e-5, atol=0)
