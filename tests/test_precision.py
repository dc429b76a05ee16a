"""Number formats: bfloat16 bases, autocast against autograd under the same autocast, TF32."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from cola.config.choices import AdapterKind, DType, MergeMode, Objective
from cola.dry_run import estimate
from cola.errors import ConfigError
from cola.models import BaseModel, build_base_model
from cola.objectives import task_loss
from cola.oracle import attach_trainable
from cola.runtime import set_matmul_precision
from cola.task_data import Batch
from tests import tiny
from tests.configs import composed
from tests.models import (
    OBJECTIVES,
    filled,
    image_problem,
    learner_of,
    model_of,
    text_problem,
    token_batches,
)
from tests.tolerances import BFLOAT16

CNN = {"model_type": "cnn", "channels": [4, 6]}
MODES = (MergeMode.unmerged, MergeMode.merged)


def built(name: str, **settings: Any) -> BaseModel:
    if name == "cnn":
        model = model_of(name, architecture=CNN, **settings)
        return build_base_model(model, image_problem(1, 8, 8), seed=0)
    problem = text_problem(OBJECTIVES[name])
    return build_base_model(model_of(name, **settings), problem, seed=0)


def objective_of(name: str) -> str:
    return OBJECTIVES.get(name, "image")


def batch_of(name: str) -> Batch:
    if name == "cnn":
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(3, 1, 8, 8, generator=generator)
        return Batch(inputs={"pixels": pixels}, labels=torch.tensor([0, 4, 9]), num_terms=3)
    return token_batches(OBJECTIVES[name], 1)[0]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# Autocast ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AdapterKind, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("name", "checkpoints"),
    [("tiny-bart", False), ("tiny-bart", True), ("tiny-llama", False), ("cnn", False)],
)
def test_gradients_under_autocast_equal_autograd(
    name: str, kind: AdapterKind, checkpoints: bool
) -> None:
    base, batch = built(name, autocast=True, gradient_checkpointing=checkpoints), batch_of(name)
    own = filled(base, kind)
    learner = learner_of(base, objective_of(name), own)
    loss = learner.record(batch, None)
    found = {site: tiny.flat_gradient(adapter) for site, adapter in learner.export().items()}
    learner.close()
    base = built(name, autocast=True)
    base.module.train().requires_grad_(False)
    attach_trainable(base.module, own, scale=tiny.SCALE)
    wanted = task_loss(Objective[objective_of(name)], base.module(**batch.inputs).logits, batch)
    wanted.backward()
    assert loss == wanted  # both forward passes round alike
    for site, adapter in own.items():
        assert relative(found[site], tiny.flat_gradient(adapter)) <= BFLOAT16, site


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_gradients_of_merged_adapters_under_autocast_are_those_of_the_weights(name: str) -> None:
    base, batch = built(name, autocast=True), batch_of(name)
    learner = learner_of(
        base, objective_of(name), filled(base, AdapterKind.linear), MergeMode.merged
    )
    learner.record(batch, None)
    adapters = learner.export()
    weights = {}
    for site in base.sites:
        weight = nn.Parameter(base.module.get_submodule(site).get_parameter("weight").clone())
        base.module.get_submodule(site).weight = weights[site] = weight
    task_loss(Objective[objective_of(name)], base.module(**batch.inputs).logits, batch).backward()
    for site, weight in weights.items():
        wanted = tiny.SCALE * (weight.grad.T if name == "tiny-gpt2" else weight.grad)
        assert relative(adapters[site].weight.grad, wanted) <= BFLOAT16, site


def test_autocast_sends_half_of_the_bytes_and_keeps_parameters_wide() -> None:
    sent = {}
    for autocast in (False, True):
        base = built("tiny-llama", autocast=autocast)
        learner = learner_of(base, "causal", filled(base, AdapterKind.linear), num_workers=1)
        learner.record(batch_of("tiny-llama"), None)
        assert {p.dtype for p in base.module.parameters()} == {torch.float32}
        adapters = learner.export()
        assert {p.dtype for a in adapters.values() for p in a.parameters()} == {torch.float32}
        returned = sum(p.nbytes for a in adapters.values() for p in a.parameters())
        sent[autocast] = learner.measure().wire_bytes - returned
        learner.close()
    assert sent[False] == 2 * sent[True] > 0


def test_autocast_holds_in_evaluation_and_for_whoever_calls_forward() -> None:
    base = built("tiny-llama", autocast=True)
    batch = batch_of("tiny-llama")
    learner = learner_of(base, "causal", filled(base, AdapterKind.lowrank))
    with learner.evaluating() as model, torch.no_grad():
        assert model(**batch.inputs).logits.dtype is torch.bfloat16
        assert model.forward(**batch.inputs).logits.dtype is torch.bfloat16  # as peft calls it
        inputs = {key: batch.inputs[key] for key in ("input_ids", "attention_mask")}
        assert model.generate(**inputs, max_new_tokens=2).shape == (2, 9)
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_for_float32_models() -> None:
    with pytest.raises(ConfigError, match=r"autocast=true with model\.dtype=bfloat16.*float32"):
        composed("task=glue", "model.autocast=true", "model.dtype=bfloat16")


def test_dry_run_under_autocast_halves_the_wire() -> None:
    wide, narrow = (
        estimate(composed("task=synthetic", "offload=cpu", f"model.autocast={cast}").config)
        for cast in ("false", "true")
    )
    assert wide.wire_out_bytes == 2 * narrow.wire_out_bytes
    assert wide.wire_back_bytes == narrow.wire_back_bytes


# bfloat16 and float16 ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_bfloat16_llama_learns_with_float32_adapters_on_the_cpu(mode: MergeMode) -> None:
    base = built("tiny-llama", dtype=DType.bfloat16)
    learner = learner_of(base, "causal", filled(base, AdapterKind.lowrank), mode, num_workers=2)
    losses = tiny.train(learner, 8 * [batch_of("tiny-llama")])
    adapters = dict(learner.export())
    learner.close()
    assert {p.dtype for a in adapters.values() for p in a.parameters()} == {torch.float32}
    assert losses[-1] < 0.8 * losses[0]


def test_float16_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ConfigError, match=r"dtype=float16: hidden gradients underflow.*use bfloat16.*or float32"
    ):
        composed("task=glue", "model.dtype=float16")


# TF32 --------------------------------------------------------------------------------------------


@pytest.fixture
def precisions() -> Iterator[list[Any]]:
    parts = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [part.fp32_precision for part in parts]
    yield parts
    for part, precision in zip(parts, before, strict=True):
        part.fp32_precision = precision


def test_tf32_is_set_on_and_off_whatever_it_was(precisions: list[Any]) -> None:
    for tf32, wanted in ((True, "tf32"), (False, "ieee"), (True, "tf32")):
        set_matmul_precision(tf32=tf32, device=torch.device("cuda"))
        assert [part.fp32_precision for part in precisions] == [wanted, wanted]


def test_tf32_on_the_cpu_is_warned_about(
    precisions: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        set_matmul_precision(tf32=False, device=torch.device("cpu"))
        assert not caplog.records
        set_matmul_precision(tf32=True, device=torch.device("cpu"))
    assert "model.tf32=true has no effect on device=cpu" in caplog.text
