"""Adapters as files: they load to equal tensors, and in PEFT to equal logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cola import trainer
from cola.config.choices import Objective
from cola.export import can_export_peft
from cola.models import build_base_model
from cola.task_data import Problem
from tests.runs import Run, config_of, run, small_synthetic

FLOAT32 = 1e-5
INPUTS = {
    "input_ids": torch.arange(4, 28).reshape(3, 8),
    "attention_mask": torch.ones(3, 8, dtype=torch.long),
}


@pytest.fixture(autouse=True)
def _small():
    with small_synthetic():
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Pretrained folders: encoders and decoders.

    The encoder is `headless`, `headed`, or has a head of which two labels keep one layer
    (`relabelled`). `scorer` is a decoder used as a classifier: its new head has no bias.
    """
    folders = {}
    names = {
        "headless": "roberta",
        "headed": "roberta",
        "relabelled": "roberta",
        "decoder": "gpt2",
        "scorer": "gpt2",
    }
    for name, family in names.items():
        config = config_of("task=synthetic", f"model=tiny-{family}")
        objective = Objective.causal if family == "gpt2" else Objective.classification
        problem = Problem(
            objective=objective,
            num_labels=3 if name == "relabelled" else 2,
            image_shape=None,
            max_length=32,
        )
        base = build_base_model(config.model, problem, seed=7)
        folders[name] = tmp_path_factory.mktemp(name)
        module = base.module.roberta if name == "headless" else base.module
        module.save_pretrained(folders[name])
        base.tokenizer.save_pretrained(folders[name])
    return folders


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**INPUTS).logits.clone()


def trained(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> tuple[Run, Tensor]:
    """A run, and logits of its model as it was when it was reported on."""
    seen: list[Tensor] = []
    evaluate = trainer.evaluate

    def spy(model, *arguments, **settings):
        seen.append(logits(model))
        return evaluate(model, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", spy)
        done = run(folder, "task=synthetic", *overrides, "trainer.max_steps=6",
                   "trainer.batch_size=16", "optimizer.lr=1e-2",
                   "generation.max_new_tokens=4")  # fmt: skip
    return done, seen[-1]


def load_peft(done: Run, base: Path, *, is_causal: bool) -> nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if is_causal:
        model = AutoModelForCausalLM.from_pretrained(base)
    else:
        # As many labels as the task has, which may differ from the base's own.
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=2, ignore_mismatched_sizes=True
        )
    return PeftModel.from_pretrained(model, done.folder / "adapters" / "peft").eval()


COLA, LORA = ("method=cola", "adapter.alpha=0.5"), ("method=lora", "adapter.alpha=0.5")
MERGED = ("method=cola", "adapter.alpha=2", "merge=merged", "adapter.rank=3")


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        ("headless", COLA),
        ("decoder", MERGED),
        ("headed", COLA),
        ("scorer", LORA),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                ("headless", MERGED),
                ("headless", LORA),
                ("decoder", COLA),
                ("decoder", LORA),
                ("relabelled", COLA),
                ("scorer", COLA),
            )
        ),
    ],
)
def test_peft_gives_the_trained_logits(tmp_path, monkeypatch, bases, base, overrides):
    posed = ["task.objective=classification"] if base == "scorer" else []
    model = ("model=hf", f"model.path={bases[base]}", *posed)
    done, wanted = trained(monkeypatch, tmp_path, *model, *overrides)
    model = load_peft(done, bases[base], is_causal=base == "decoder")
    torch.testing.assert_close(logits(model), wanted, rtol=FLOAT32, atol=FLOAT32)
    with model.disable_adapter():
        assert (logits(model) - wanted).abs().max() > 1e-3  # the adapters say something


@pytest.mark.parametrize("overrides", [COLA, LORA])
def test_peft_gives_the_trained_logits_with_sites_in_a_stored_head(
    tmp_path, monkeypatch, bases, overrides
):
    model = ("model=hf", f"model.path={bases['headed']}", "model.sites=[query,dense]")
    done, wanted = trained(monkeypatch, tmp_path, *model, *overrides)
    found = logits(load_peft(done, bases["headed"], is_causal=False))
    torch.testing.assert_close(found, wanted, rtol=FLOAT32, atol=FLOAT32)


def test_peft_folder_names_its_base_and_heads(tmp_path, monkeypatch, bases):
    done, _ = trained(monkeypatch, tmp_path, "model=hf", f"model.path={bases['headless']}")
    config = json.loads((done.folder / "adapters/peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases["headless"])
    assert (config["r"], config["lora_alpha"], config["bias"]) == (8, 8, "none")
    assert config["modules_to_save"] == ["classifier"]
    assert config["task_type"] == "SEQ_CLS"
    assert len(config["target_modules"]) == 4


def test_run_keeps_what_no_pretrained_file_holds(tmp_path, monkeypatch, bases):
    done, _ = trained(monkeypatch, tmp_path, "model=hf", f"model.path={bases['headless']}")
    kept = load_file(done.folder / "base.safetensors")
    assert set(kept) == {
        f"classifier.{layer}.{part}"
        for layer in ("dense", "out_proj")
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        (("model=tiny-roberta",), {"lowrank": 4, "linear": 2}),
        (("model=tiny-gpt2", "adapter=linear"), {"linear": 2}),
        (("model=tiny-gpt2", "adapter=mlp"), {"mlp": 2}),
        (("model=tiny-roberta", "method=lora"), {"lowrank": 4, "linear": 2}),
    ],
    ids=lambda value: " ".join(value),
)
def test_adapters_are_described_and_load_to_equal_tensors(tmp_path, monkeypatch, overrides, kinds):
    exported = {}
    from cola import export

    true = export.export_adapters

    def spy(folder, adapters, **settings):
        exported.update(adapters)
        true(folder, adapters, **settings)

    monkeypatch.setattr(export, "export_adapters", spy)
    done, _ = trained(monkeypatch, tmp_path, *overrides, "adapter.alpha=0.5")
    described = json.loads((done.folder / "adapters" / "adapters.json").read_text())
    assert (described["format_version"], described["scale"]) == (1, 0.5)
    assert described["base_model"] == done.summary["model"]
    found = [adapter["kind"] for adapter in described["adapters"].values()]
    assert {kind: found.count(kind) for kind in found} == kinds
    wanted = {
        f"{site}/{name}": parameter
        for site, adapter in exported.items()
        for name, parameter in adapter.named_parameters()
    }
    assert done.adapters.keys() == wanted.keys()
    for key, tensor in done.adapters.items():
        assert torch.equal(tensor, wanted[key]), key
        site, name = key.split("/")
        assert described["adapters"][site]["shapes"][name] == list(tensor.shape)


def test_convolution_is_described_with_its_geometry(tmp_path):
    run(tmp_path, "task=digits", "model=cnn", "task.max_train_rows=64", "trainer.max_steps=1")
    described = json.loads((tmp_path / "adapters" / "adapters.json").read_text())["adapters"]
    assert described["conv2"] == {
        "kind": "lowrank", "site_kind": "conv2d", "in_features": 64, "out_features": 128,
        "is_head": False, "shapes": {"lora_a": [8, 64, 3, 3], "lora_b": [128, 8, 1, 1]},
        "kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1],
    }  # fmt: skip
    assert not (tmp_path / "adapters" / "peft").exists()


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_other_adapters_have_no_peft_folder(tmp_path, adapter):
    run(tmp_path, "task=synthetic", f"adapter={adapter}", "trainer.max_steps=1")
    assert (tmp_path / "adapters" / "adapters.safetensors").exists()
    assert not (tmp_path / "adapters" / "peft").exists()


def test_heads_alone_have_no_peft_folder():
    assert not can_export_peft({}, Objective.classification)
