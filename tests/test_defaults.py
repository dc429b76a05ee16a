"""The table of default learning rates and clipping."""

import dataclasses
import functools

import pytest

from cola.config.choices import AdapterKind, ClipMode, MethodName
from cola.config.defaults import LEARNING_RATES, resolve_defaults
from cola.config.schema import ExperimentConfig
from cola.config.store import compose_config
from cola.errors import ConfigError

HF = ("task=glue", "model=hf", "model.path=somewhere")
GLUE = ("task=glue",)
IMAGES = ()
LLAMA_DOLLY = ("task=dolly", "model=llama-2-7b")
TINY_GPT2 = ("task=synthetic", "model=tiny-gpt2")


@functools.cache
def composed(*overrides: str) -> ExperimentConfig:
    return compose_config(overrides)


def resolved(base, method="cola", adapter="lowrank", subset=None) -> ExperimentConfig:
    """A composed base with other choices put in, its defaults looked up anew."""
    config = composed(*base)
    return resolve_defaults(
        dataclasses.replace(
            config,
            method=dataclasses.replace(config.method, name=MethodName[method]),
            adapter=dataclasses.replace(config.adapter, kind=AdapterKind[adapter]),
            task=dataclasses.replace(config.task, subset=subset),
            optimizer=dataclasses.replace(config.optimizer, lr=None, clip=None),
        )
    )


@pytest.mark.parametrize(
    ("choices", "lr"),
    [
        # Paper, Table 5.
        ((GLUE, "ft", "lowrank", "mrpc"), 5e-6),
        ((GLUE, "lora", "lowrank", "mrpc"), 3e-4),
        ((GLUE, "cola", "lowrank", "mrpc"), 3e-4),
        ((GLUE, "cola", "mlp", "mrpc"), 3e-4),
        # Paper, section C.1: linear, five sets of eight.
        ((GLUE, "cola", "linear", "mnli"), 5e-6),
        ((GLUE, "cola", "linear", "sst2"), 5e-6),
        ((GLUE, "cola", "linear", "qnli"), 5e-6),
        ((GLUE, "cola", "linear", "qqp"), 5e-6),
        ((GLUE, "cola", "linear", "rte"), 5e-6),
        ((GLUE, "cola", "linear", "mrpc"), 3e-4),
        ((GLUE, "cola", "linear", "cola"), 3e-4),
        ((GLUE, "cola", "linear", "stsb"), 3e-4),
        ((LLAMA_DOLLY, "cola", "linear"), 5e-6),
        ((LLAMA_DOLLY, "cola", "lowrank"), 3e-4),
        ((GLUE, "lora", "linear", "rte"), 3e-4),  # the adapter is not the baseline's
        # Images.
        ((IMAGES, "cola", "lowrank"), 3e-2),
        ((IMAGES, "ft"), 3e-2),
        # Small encoders (docs/results/mrpc.json).
        ((HF, "ft", "lowrank", "mrpc"), 5e-5),
        ((HF, "lora", "lowrank", "mrpc"), 3e-3),
        ((HF, "cola", "lowrank", "mrpc"), 3e-3),
        ((HF, "cola", "mlp", "mrpc"), 3e-4),
        ((HF, "cola", "linear", "rte"), 3e-4),
        ((TINY_GPT2, "cola", "lowrank"), 3e-3),
        ((TINY_GPT2, "lora"), 3e-3),
        # The other baselines of the PEFT library.
        ((GLUE, "adalora", "lowrank", "mrpc"), 3e-4),
        ((GLUE, "prompt", "lowrank", "rte"), 3e-4),
        ((HF, "ia3", "lowrank", "mrpc"), 3e-3),
        ((HF, "prefix", "lowrank", "mrpc"), 1e-2),
        ((TINY_GPT2, "ptuning"), 3e-2),
    ],
)
def test_default_learning_rate(choices, lr):
    assert resolved(*choices).optimizer.lr == lr


@pytest.mark.parametrize(
    ("choices", "clip"),
    [
        ((IMAGES, "cola"), "adapter"),
        ((IMAGES, "ft"), "global"),
        ((IMAGES, "lora"), "global"),
        ((GLUE, "cola"), "none"),
        ((TINY_GPT2, "ft"), "none"),
    ],
)
def test_default_clipping(choices, clip):
    assert resolved(*choices).optimizer.clip is ClipMode[clip]


def test_explicit_value_wins():
    config = compose_config(["optimizer.lr=0.5", "optimizer.clip=none"])
    assert (config.optimizer.lr, config.optimizer.clip) == (0.5, ClipMode["none"])


def without_lr() -> ExperimentConfig:
    config = composed(*IMAGES)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=None))


def test_resolving_twice_changes_nothing():
    assert resolve_defaults(composed(*GLUE)) == composed(*GLUE)


def test_resolving_leaves_its_argument_alone():
    config = without_lr()
    assert resolve_defaults(config).optimizer.lr == 3e-2
    assert config.optimizer.lr is None


def test_table_without_a_last_row_says_so(monkeypatch):
    monkeypatch.setattr("cola.config.defaults.LEARNING_RATES", LEARNING_RATES[1:2])
    with pytest.raises(ConfigError, match="no default for this method"):
        resolve_defaults(without_lr())
