"""Baselines of the PEFT library: positions, alignment, generation, heads, folders, settings."""

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from cola.baselines.methods import PeftMethod, build_peft_method
from cola.config.choices import MethodName, Objective
from cola.config.schema import ExperimentConfig, MethodConfig
from cola.errors import ConfigError, SiteError
from cola.interfaces import Adaptation
from cola.learners import build_learner
from cola.models import BaseModel, build_base_model
from cola.task_data import Batch
from cola.tasks import resolve_problem
from tests.runs import config_of, run, small_synthetic
from tests.tolerances import EXACT

METHODS = ("adalora", "ia3", "prompt", "prefix", "ptuning")
VIRTUAL = ("prompt", "prefix", "ptuning")
DECODERS = ("tiny-gpt2", "tiny-llama")
WRITERS = (*DECODERS, "tiny-bart")
NUM_VIRTUAL = 3
NEW = 5
GENERATION = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "use_cache": True}
ENDLESS = {"suppress_tokens": [3]}  # the EOS of tiny models


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@functools.cache
def configured(model: str, *overrides: str) -> ExperimentConfig:
    return config_of("task=synthetic", f"model={model}", "model.dtype=float64", *overrides)


def with_method(config: ExperimentConfig, name: str, **settings: Any) -> ExperimentConfig:
    small = {"virtual_tokens": NUM_VIRTUAL, "encoder_hidden": 8, "init_rank": 4, "target_rank": 2}
    method = MethodConfig(**{"name": MethodName[name], **small, **settings})
    return dataclasses.replace(config, method=method)


def build_base(config: ExperimentConfig) -> tuple[BaseModel, Objective]:
    problem = resolve_problem(config.task, config.model.family)
    return build_base_model(config.model, problem, seed=0), problem.objective


class Built(NamedTuple):
    base: BaseModel
    method: PeftMethod


def build(config: ExperimentConfig) -> Built:
    base, objective = build_base(config)
    return Built(base, build_peft_method(config, base, objective, adaptations=10))


@functools.cache
def filled(model: str, name: str) -> Built:
    """Built once for all tests that only look; its parameters are away from where they start."""
    built = build(with_method(configured(model), name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in built.method.trainable.items():
            if not key.startswith("classifier"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter), alpha=0.3)
    built.method.model.eval()
    return built


ALONE = torch.tensor([[5, 9, 14, 7]])


def padded(*, left: bool) -> dict[str, Tensor]:
    """The row of `ALONE`, padded, and a longer one."""
    other, pads = torch.tensor([[6, 8, 10, 12, 11, 13, 15]]), torch.zeros(1, 3, dtype=torch.long)
    row = torch.cat([pads, ALONE] if left else [ALONE, pads], dim=1)
    ids = torch.cat([row, other])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def alone() -> dict[str, Tensor]:
    return {"input_ids": ALONE, "attention_mask": torch.ones_like(ALONE)}


def positioned(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the causal collator gives them."""
    positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return {**inputs, "position_ids": positions}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**inputs).logits
    return result


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["tiny-gpt2", *slow("tiny-llama")])
def test_logits_do_not_depend_on_left_padding(model, name):
    network = filled(model, name).method.model
    row = logits(network, positioned(alone()))
    batch = logits(network, positioned(padded(left=True)))
    assert batch.shape[:2] == (2, 7)
    torch.testing.assert_close(batch[0, 3:], row[0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", VIRTUAL)
def test_logits_stand_at_their_tokens(name):
    network = filled("tiny-gpt2", name).method.model
    changed = alone()
    changed["input_ids"] = torch.cat([ALONE[:, :-1], torch.tensor([[13]])], dim=1)
    before, after = logits(network, alone()), logits(network, changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_classified_alone_as_in_a_batch(name):
    network = filled("tiny-roberta", name).method.model
    row, batch = logits(network, alone()), logits(network, padded(left=False))
    torch.testing.assert_close(batch[0], row[0], rtol=EXACT, atol=EXACT)
    pristine = build_base(configured("tiny-roberta"))[0].module
    assert not torch.allclose(row, logits(pristine, alone())), "the method has no effect"


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*VIRTUAL, *slow("adalora", "ia3")])
@pytest.mark.parametrize("model", ["tiny-gpt2", *slow("tiny-llama"), "tiny-bart"])
def test_text_of_a_row_is_the_same_alone_and_in_a_batch(model, name, beams):
    network = filled(model, name).method.model
    is_decoder = model in DECODERS
    settings = GenerationConfig(**GENERATION, **ENDLESS, num_beams=beams, **starts(model))
    row = network.generate(**alone(), generation_config=settings)
    batch = network.generate(**padded(left=is_decoder), generation_config=settings)
    begins = 7 if is_decoder else 1
    assert row.shape[1] == (4 if is_decoder else 1) + NEW
    assert torch.equal(batch[0, begins:], row[0, -NEW:])
    if is_decoder:
        assert torch.equal(row[:, :4], ALONE)
        assert torch.equal(batch[:, :7], padded(left=True)["input_ids"])


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize("model", ["tiny-gpt2", *slow("tiny-llama"), "tiny-bart"])
def test_text_is_what_the_forward_pass_predicts(model, name):
    network = filled(model, name).method.model
    settings = GenerationConfig(**GENERATION, **ENDLESS, **starts(model))
    found = network.generate(**alone(), generation_config=settings)
    tokens = ALONE if model in DECODERS else torch.tensor([[3]])
    for _ in range(NEW):
        if model in DECODERS:
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        else:
            inputs = {**alone(), "decoder_input_ids": tokens}
        scores = logits(network, inputs)[:, -1]
        scores[:, ENDLESS["suppress_tokens"]] = -torch.inf
        tokens = torch.cat([tokens, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found, tokens)


def starts(model: str) -> dict[str, int]:
    return {} if model in DECODERS else {"decoder_start_token_id": 3}


def test_settings_of_generation_are_the_base_models():
    built = filled("tiny-gpt2", "prompt")
    settings = GenerationConfig(max_new_tokens=1)
    before = built.method.model.generation_config
    built.method.model.generation_config = settings
    assert built.base.module.generation_config is settings
    built.method.model.generation_config = before


@pytest.mark.parametrize("name", ["adalora", "ia3"])
def test_model_is_unchanged_at_the_start(name):
    built = build(with_method(configured("tiny-gpt2"), name))
    before = logits(build_base(configured("tiny-gpt2"))[0].module, alone())
    torch.testing.assert_close(logits(built.method.model, alone()), before)


@pytest.mark.parametrize("name", METHODS)
def test_the_head_trains_whole_from_where_every_method_starts(name):
    config = configured("tiny-roberta")
    wanted = dict(build_base(config)[0].module.classifier.named_parameters())
    trainable = build(with_method(config, name)).method.trainable
    found = {
        key.replace(".base_layer", "").rpartition("classifier.")[2].removeprefix(
            "modules_to_save.default."): value
        for key, value in trainable.items() if "classifier." in key and ".lora_" not in key
    }  # fmt: skip
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("name", METHODS)
def test_initial_parameters_are_those_of_the_seed(name):
    config = with_method(configured("tiny-gpt2"), name)
    one = build(config).method.trainable
    torch.manual_seed(99)
    other = build(config).method.trainable
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    if name in ("adalora", "prefix", "ptuning"):
        third = build(dataclasses.replace(config, seed=1)).method.trainable
        assert any(not torch.equal(value, third[key]) for key, value in one.items())


def test_prompt_starts_from_its_text():
    config = with_method(configured("tiny-bart"), "prompt", init_text="cat dog")
    base, _ = build_base(config)
    ids = base.tokenizer("cat dog")["input_ids"]
    built = build(config)
    (found,) = built.method.trainable.values()
    assert len(found) == 2 * NUM_VIRTUAL  # PEFT holds as many for the decoder
    repeated = torch.tensor(ids * 6)[: len(found)]
    wanted = built.base.module.get_input_embeddings()(repeated)
    torch.testing.assert_close(found, wanted.to(found))


def test_prompt_of_no_token_says_so():
    config = with_method(configured("tiny-gpt2"), "prompt", init_text="\n")
    with pytest.raises(ConfigError, match=r"method.init_text='\\n' has no token"):
        build(config)


def test_targets_can_be_chosen():
    config = with_method(configured("tiny-roberta"), "ia3", sites=["query", "*.value"])
    trainable = build(config).method.trainable
    layers = {key.rpartition(".ia3_l")[0] for key in trainable if "ia3_l" in key}
    assert {name.rpartition(".")[2] for name in layers} == {"query", "value"}
    assert len(layers) == 4


def test_targets_that_are_not_there():
    config = with_method(configured("tiny-roberta"), "adalora", sites=["querry"])
    with pytest.raises(SiteError, match=r"^method.sites=\['querry'\] match no module.*set method"):
        build(config)


def distilbert(**settings: Any) -> ExperimentConfig:
    config = configured("tiny-roberta")
    architecture = {"model_type": "distilbert", "dim": 16, "hidden_dim": 16, "n_layers": 1,
                    "n_heads": 2, "vocab_size": None}  # fmt: skip
    model = dataclasses.replace(config.model, architecture=architecture, sites=["q_lin"])
    return with_method(dataclasses.replace(config, model=model), **settings)


def test_targets_that_nobody_knows():
    with pytest.raises(SiteError, match=r"PEFT knows no targets.*'distilbert'; set method.sites"):
        build(distilbert(name="ia3"))


def test_prefix_needs_a_model_that_takes_one():
    with pytest.raises(ConfigError, match=r"takes no keys and values from outside; use method=pro"):
        build(distilbert(name="prefix"))


def test_heads_of_another_name_train_too():
    trainable = build(distilbert(name="prompt")).method.trainable
    assert {key.split(".")[2] for key in trainable if "modules_to_save" in key} == {
        "pre_classifier",
        "classifier",
    }


def test_decoder_that_classifies_cannot_find_its_last_token_behind_virtual_ones():
    config = configured("tiny-gpt2", "task.objective=classification")
    with pytest.raises(ConfigError, match=r"method=ptuning with tiny-gpt2, a decoder that classif"):
        build(with_method(config, "ptuning"))


@pytest.mark.parametrize(
    ("model", "length", "virtual", "fits"),
    [
        ("tiny-roberta", 500, 13, True),  # 514 positions, which start behind the padding's
        ("tiny-roberta", 500, 14, False),
        ("tiny-gpt2", 460, 12, True),  # and 40 new ones
        ("tiny-gpt2", 460, 13, False),
        ("tiny-bart", 500, 11, True),  # and the token that its decoder starts with
        ("tiny-bart", 500, 12, False),
    ],
)
def test_virtual_tokens_need_positions(model, length, virtual, fits):
    config = configured(model)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, max_length=length))
    config = with_method(config, "prompt", virtual_tokens=virtual)
    if fits:
        build(config)
        return
    with pytest.raises(
        ConfigError, match=rf"^method.virtual_tokens={virtual} before .* exceed the"
    ):
        build(config)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["tiny-roberta", *slow("tiny-gpt2", "tiny-bart")])
def test_saved_folder_loads_onto_the_base(tmp_path, model, name):
    from peft import PeftModel

    built = filled(model, name)
    inputs = alone()
    if model == "tiny-bart":
        inputs["decoder_input_ids"] = ALONE
    built.method.save(tmp_path)
    base, _ = build_base(configured(model))
    loaded = PeftModel.from_pretrained(base.module, tmp_path).eval()
    assert loaded.peft_config["default"].base_model_name_or_path == model
    found, wanted = logits(loaded, inputs), logits(built.method.model, inputs)
    if model == "tiny-gpt2":
        found = found[:, -4:]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def batches(num: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    result = []
    for _ in range(num):
        ids = torch.randint(4, 40, (4, 6), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        labels = torch.randint(0, 2, (4,), generator=generator)
        result.append(Batch(inputs=inputs, labels=labels, num_terms=4))
    return result


def train(config: ExperimentConfig, num: int = 3) -> tuple[list[float], dict[str, Any]]:
    base, objective = build_base(config)
    torch.manual_seed(0)
    learner = build_learner(config, base, objective, adaptations=num)
    losses = []
    for number, batch in enumerate(batches(num), start=1):
        adaptation = Adaptation(number=number, learning_rate=0.05)
        losses.append(learner.record(batch, adaptation).item())
        learner.update(adaptation)
    return losses, copy.deepcopy(learner.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_state_holds_what_trains_and_nothing_frozen(name):
    config = with_method(configured("tiny-roberta"), name)
    losses, state = train(config)
    method = build(config).method
    assert state["parameters"].keys() == method.trainable.keys()
    moved = [not torch.equal(state["parameters"][k], p) for k, p in method.trainable.items()]
    assert all(moved)
    assert not any("word_embeddings" in key for key in state["buffers"])
    assert losses[-1] != losses[0]


@functools.cache
def lora_losses() -> list[float]:
    return train(with_method(configured("tiny-roberta"), "lora"))[0]


def test_losses_are_loras_when_activations_wait_on_the_cpu(monkeypatch):
    uses = []
    offload = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(
        "cola.autograd_learner.save_on_cpu",
        lambda pin_memory: uses.append(pin_memory) or offload(pin_memory=pin_memory),
    )
    config = with_method(configured("tiny-roberta"), "lora", activation_offload=True)
    assert train(config)[0] == lora_losses()
    assert uses == [False] * 3  # pinned beside a GPU


def test_losses_are_loras_with_gradient_checkpointing():
    config = configured("tiny-roberta")
    model = dataclasses.replace(config.model, gradient_checkpointing=True)
    config = with_method(dataclasses.replace(config, model=model), "lora")
    assert train(config)[0] == lora_losses()


@pytest.mark.parametrize("name", ["ia3", *slow("adalora", "prompt", "ptuning")])
def test_losses_are_the_same_with_gradient_checkpointing(name):
    plain = with_method(configured("tiny-roberta"), name)
    model = dataclasses.replace(plain.model, gradient_checkpointing=True)
    checkpointed = dataclasses.replace(plain, model=model)
    assert train(checkpointed)[0] == train(plain)[0]


@pytest.mark.parametrize("name", ["ia3", *slow("adalora", *VIRTUAL)])
@pytest.mark.parametrize("model", ["tiny-roberta", *slow(*WRITERS)])
def test_run_trains_reports_and_exports(tmp_path, model, name):
    with small_synthetic():
        done = run(tmp_path, "task=synthetic", f"model={model}", f"method={name}",
                   "trainer.max_steps=2", "trainer.log_every=1")  # fmt: skip
    assert len(done.losses) == 2
    assert (done.summary["method"], done.summary["adapter"]) == (name, None)
    assert (tmp_path / "adapters" / "peft" / "adapter_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["tiny-roberta", *WRITERS])
def test_bfloat16_base_trains(tmp_path, model, name):
    with small_synthetic():
        done = run(tmp_path, "task=synthetic", f"model={model}", f"method={name}",
                   "trainer.max_steps=2", "trainer.log_every=1",
                   "model.dtype=bfloat16")  # fmt: skip
    assert len(done.losses) == 2
