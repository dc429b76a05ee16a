"""`adapter.init`: a run starts where another one ended, or says why it cannot."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cola.checkpoint import NEW_PARAMETERS, keep_new_parameters, load_state
from cola.cli.evaluate import run_evaluation
from cola.config.choices import AdapterKind, MergeMode, MethodName, ModelSource, OffloadTarget
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError
from cola.initial_adapters import initial_adapters, start_from
from cola.learners import build_learner
from cola.models import BaseModel, build_base_model
from tests.models import model_of, text_problem
from tests.runs import Run, config_of, run, small_synthetic

SETTINGS = ("task=synthetic", "trainer.batch_size=16", "optimizer.lr=1e-2", "trainer.max_steps=4")
FLOAT32 = 1e-5
INPUTS = {
    "input_ids": torch.arange(4, 28).reshape(3, 8),
    "attention_mask": torch.ones(3, 8, dtype=torch.long),
}


@dataclasses.dataclass(frozen=True)
class Past:
    """A run that ended, and its configuration."""

    done: Run
    config: ExperimentConfig

    @property
    def folder(self) -> Path:
        return self.done.folder

    def logits(self) -> Tensor:
        """What its best state answers."""
        base = base_of(self.config)
        names, path = base.new_parameters, self.folder / NEW_PARAMETERS
        keep_new_parameters(base.module, names, path)
        state = load_state(self.folder / "checkpoints" / "best")
        return answered(self.config, base, state=state["learner"])


def base_of(config: ExperimentConfig) -> BaseModel:
    is_causal = config.model.name == "tiny-gpt2"
    problem = text_problem("causal" if is_causal else "classification")
    return build_base_model(config.model, problem, seed=config.seed)


@torch.no_grad()
def answered(
    config: ExperimentConfig, base: BaseModel, *, states: Any = None, state: Any = None
) -> Tensor:
    """Logits of a learner that starts from adapters, or goes on from a state."""
    learner = build_learner(config, base, text_problem().objective, adaptations=1)
    if state is not None:
        learner.load_state_dict(state)
    start_from(learner, states or {})
    with learner.evaluating() as model:
        logits: Tensor = model(**INPUTS).logits.clone()
    learner.close()
    return logits


def started(config: ExperimentConfig) -> Tensor:
    """Logits of a fresh run at its start."""
    base = base_of(config)
    return answered(config, base, states=initial_adapters(config, base))


def changed(config: ExperimentConfig, init: Path | None, **settings: Any) -> ExperimentConfig:
    """Another run's configuration: another seed, `adapter.init`, and what is given."""
    for name in ("adapter", "merge", "model", "offload", "method"):
        given = settings.pop(name, {}) | ({"init": init and str(init)} if name == "adapter" else {})
        node = dataclasses.replace(getattr(config, name), **given)
        config = dataclasses.replace(config, **{name: node})
    return dataclasses.replace(config, seed=8)


def trained(folder: Path, *overrides: str) -> Past:
    settings = (*SETTINGS, "seed=3", *overrides)
    with small_synthetic():
        return Past(run(folder, *settings), config_of(*settings))


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Past:
    """Low-rank adapters and heads on a base of random weights."""
    return trained(tmp_path_factory.mktemp("first"), "adapter.alpha=0.5")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Past:
    """The same on a pretrained encoder, whose head is random."""
    folder = tmp_path_factory.mktemp("pretrained")
    base = build_base_model(model_of("tiny-roberta"), text_problem(), seed=7)
    base.module.roberta.save_pretrained(folder)
    assert base.tokenizer is not None
    base.tokenizer.save_pretrained(folder)
    model = ("model=hf", f"model.path={folder}")
    return trained(tmp_path_factory.mktemp("adapted"), *model, "adapter.alpha=2")


# A start that fits -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "adapters"])
def test_run_starts_where_the_other_ended(first, part):
    assert torch.equal(started(changed(first.config, first.folder / part)), first.logits())
    assert not torch.equal(started(changed(first.config, None)), first.logits())


def test_merged_and_offloaded_run_starts_where_the_other_ended(first):
    config = changed(
        first.config, first.folder, merge={"mode": MergeMode.merged},
        offload={"name": OffloadTarget.cpu},
    )  # fmt: skip
    torch.testing.assert_close(started(config), first.logits(), rtol=FLOAT32, atol=FLOAT32)


def test_random_head_of_the_other_run_comes_along(adapted):
    assert torch.equal(started(changed(adapted.config, adapted.folder)), adapted.logits())


def test_peft_folder_brings_its_heads_as_differences(adapted):
    config = changed(adapted.config, adapted.folder / "adapters" / "peft")
    base, other = base_of(config), load_file(adapted.folder / NEW_PARAMETERS)
    states = initial_adapters(config, base)
    found = answered(config, base, states=states)
    torch.testing.assert_close(found, adapted.logits(), rtol=FLOAT32, atol=FLOAT32)
    own = base.module.state_dict()["classifier.dense.weight"]
    assert not torch.equal(own, other["classifier.dense.weight"])


def test_whole_run_starts_there_and_goes_on_from_its_own_state(tmp_path, first):
    source = tmp_path / "source"
    shutil.copytree(first.folder, source)
    still = (*SETTINGS[:2], "optimizer.lr=1e-30", "trainer.max_steps=1")  # moves nothing
    settings = (*still, f"adapter.init={source}", "adapter.alpha=0.5", "seed=8")
    with small_synthetic():
        done = run(tmp_path / "run", *settings)
        assert done.summary["result"]["scores"] == first.done.summary["result"]["scores"]
        kept, wanted = (load_file(r.folder / NEW_PARAMETERS) for r in (done, first.done))
        assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
        shutil.rmtree(source)
        assert run_evaluation([f"run={done.folder}"]) == 0  # on the other run's random weights
        (written,) = (done.folder / "evaluations").iterdir()
        splits = json.loads(written.read_text())["splits"]
        assert splits["test"]["scores"] == done.summary["result"]["scores"]["test"]
        (done.folder / "summary.json").unlink()
        again = run(tmp_path / "run", *settings, resume=True)
    assert again.summary["result"]["scores"] == done.summary["result"]["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "adapters/peft"])
def test_writing_run_starts_where_the_other_ended(tmp_path, part):
    past = trained(tmp_path, "model=tiny-gpt2", "generation.max_new_tokens=2")
    config = dataclasses.replace(changed(past.config, past.folder / part), seed=3)
    torch.testing.assert_close(started(config), past.logits(), rtol=FLOAT32, atol=FLOAT32)


# A start that does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"rank": 4}}, r"has lora_a \[8, 64\], lora_b \[64, 8\] there and needs "
         r"lora_a \[4, 64\], lora_b \[64, 4\]"),
        ({"adapter": {"kind": AdapterKind.linear}}, r"lora_b \[64, 8\] there and needs weight "),
        ({"adapter": {"alpha": 2.0}}, r"adapter.alpha is 0.5 there and 2 here; set model, mod"),
        ({"model": {"sites": ["query"]}}, "value have adapters there and none here"),
        ({"model": {"sites": ["query", "value", "key"]}}, "no adapter is there for .+self.key"),
        ({"model": vars(model_of("tiny-gpt2"))}, "have not the same new parameters"),
        ({"method": {"name": MethodName.lora}}, "does not apply to method=lora; leave it out"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(first, settings, message):
    config = changed(first.config, first.folder, **settings)
    with pytest.raises(ConfigError, match=rf"adapter\.init=.+{message}"):
        initial_adapters(config, base_of(config))


def refused(config: ExperimentConfig, init: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        started(changed(config, init))


def test_adapters_without_the_weights_they_sit_on_are_refused(tmp_path, first):
    shutil.copytree(first.folder / "adapters", tmp_path / "adapters")
    message = r"act on random parameters .+ give the run's whole fol"
    refused(first.config, tmp_path / "adapters", message)


@pytest.mark.parametrize(("name", "state"), [("none", "is no folder"), ("", "holds neither")])
def test_folder_without_adapters_is_refused(tmp_path, first, name, state):
    refused(first.config, tmp_path / name, rf"{state}.*; give the folder of a finished run")


@pytest.fixture
def peft(tmp_path, adapted) -> Path:
    return Path(shutil.copytree(adapted.folder / "adapters" / "peft", tmp_path / "peft"))


def test_peft_folder_of_another_kind_is_refused(adapted, peft):
    path = peft / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    refused(adapted.config, peft, "a plain LoRA is needed, without use_dora")


def test_peft_folder_that_changes_more_than_the_sites_is_refused(adapted, peft):
    tensors = load_file(peft / "adapter_model.safetensors")
    name = "roberta.embeddings.word_embeddings.weight"
    tensors[f"base_model.model.{name}"] = torch.zeros(2, 2)
    save_file(tensors, peft / "adapter_model.safetensors")
    refused(adapted.config, peft, f"{name} changed there and are no sites here")


def test_folder_that_cannot_be_read_is_refused(adapted, peft):
    (peft / "adapter_model.safetensors").write_bytes(b"torn")
    refused(adapted.config, peft, r"adapter\.init=.+peft: cannot be read \(SafetensorError")


def test_other_base_model_is_named(tmp_path, adapted, caplog):
    other = shutil.copytree(adapted.config.model.path, tmp_path / "moved")
    assert adapted.config.model.source is ModelSource.pretrained
    started(changed(adapted.config, adapted.folder, model={"path": str(other)}))
    assert f"they were trained on {adapted.config.model.path}" in caplog.text
