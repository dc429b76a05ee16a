"""LoRA is set up as the mirror of the low-rank adapter, and starts as the base model."""

import pytest
import torch
from torch import Tensor, nn

from cola.adapters import LinearAdapter, LowRankAdapter, build_adapter
from cola.baselines.lora import inject_lora
from cola.config.choices import AdapterKind
from cola.config.schema import AdapterConfig
from cola.models import BaseModel, build_base_model
from cola.tasks import resolve_problem
from tests.runs import config_of

MODELS = {
    "tiny-roberta": ("task=synthetic", "model=tiny-roberta"),
    "tiny-gpt2": ("task=synthetic", "model=tiny-gpt2"),
    "cnn": ("task=digits", "model=cnn"),
}
LOWRANK = AdapterConfig(kind=AdapterKind.lowrank, rank=3, alpha=0.5)


def build(name: str) -> BaseModel:
    config = config_of(*MODELS[name])
    problem = resolve_problem(config.task, config.model.family)
    return build_base_model(config.model, problem, seed=0)


@torch.no_grad()
def logits(name: str, model: nn.Module) -> Tensor:
    if name == "cnn":
        return model(pixels=torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)).logits
    return model(input_ids=torch.arange(4, 16).reshape(2, 6)).logits


@pytest.mark.parametrize("name", MODELS)
def test_trainable_parameters_are_those_of_lowrank(name):
    base = build(name)
    adapters = [build_adapter(LOWRANK, spec, seed=0) for spec in base.sites.values()]
    trainable, _ = inject_lora(base.module, base.sites, LOWRANK, seed=0)
    assert sum(p.numel() for p in trainable.values()) == sum(
        p.numel() for adapter in adapters for p in adapter.parameters()
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_equals_that_of_lowrank_bit_for_bit(name):
    base = build(name)
    _, collect = inject_lora(base.module, base.sites, LOWRANK, seed=4)
    collected = collect()
    assert list(collected) == list(base.sites)
    for site, spec in base.sites.items():
        wanted = build_adapter(LOWRANK, spec, seed=4)
        assert type(collected[site]) is (LinearAdapter if spec.is_head else LowRankAdapter)
        for key, value in wanted.state_dict().items():
            assert torch.equal(collected[site].state_dict()[key], value), (site, key)


@pytest.mark.parametrize("name", MODELS)
def test_model_is_unchanged_at_the_start(name):
    base = build(name)
    before = logits(name, base.module)
    inject_lora(base.module, base.sites, LOWRANK, seed=0)
    assert torch.equal(logits(name, base.module.eval()), before)


def test_heads_start_at_the_frozen_weights():
    base = build("tiny-roberta")
    before = {name: value.clone() for name, value in base.module.classifier.named_parameters()}
    trainable, _ = inject_lora(base.module, base.sites, LOWRANK, seed=0)
    for name, value in before.items():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(base.module.classifier.get_submodule(owner), leaf), value)
    deltas = {name: p for name, p in trainable.items() if name.startswith("classifier.")}
    assert len(deltas) == 4
    assert not any(delta.any() for delta in deltas.values())


@pytest.mark.parametrize("name", MODELS)
def test_filled_lora_equals_the_filled_adapters(name):
    base = build(name)
    trainable, collect = inject_lora(base.module, base.sites, LOWRANK, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    pristine = build(name)
    for site, adapter in collect().items():
        _add(pristine.module.get_submodule(site), adapter)
    found, wanted = logits(name, base.module.eval()), logits(name, pristine.module)
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(found, logits(name, build(name).module))


def _add(module: nn.Module, adapter: LowRankAdapter | LinearAdapter) -> None:
    module.register_forward_hook(
        lambda _, args, hidden: hidden + LOWRANK.alpha * adapter(args[0]).detach()
    )
