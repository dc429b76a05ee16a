"""Trainable parameters of every model and method: exact, and as the paper prints them.

Three printed values are slips: full fine-tuning of RoBERTa (125.2 M) counts its head twice, the
CNN's 155.5 K are 1.555 M, as the percentages beside them say, and AdaLoRA's 160.0 M of Llama-2
(All) are 159.9 M.
"""

import dataclasses
import functools

import pytest

from cola.config.choices import AdapterKind, MethodName
from cola.config.schema import ExperimentConfig
from cola.dry_run import estimate
from tests.configs import composed

MODELS = {
    "roberta-base": ("task=glue",),
    "bart-base": ("task=synthetic", "model=bart-base"),
    "gpt2": ("task=synthetic", "model=gpt2"),
    "llama-2-7b": ("task=synthetic", "model=llama-2-7b"),
    "llama-2-7b all": ("task=synthetic", "model=llama-2-7b", "model.sites=all"),
    "linear": ("task=mnist", "model=linear"),
    "mlp": ("task=mnist", "model=mlp"),
    "cnn": ("task=mnist", "model=cnn"),
}
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}

# Exact, and as printed in Tables 2, 3, 6, 7, 9 and 14, slips corrected.
COUNTS = {
    "roberta-base": {
        "ft": (124_647_170, "124.6 M"),
        "lora": (887_042, "887.0 K"),
        "adalora": (11_311_938, "11.3 M"),
        "ia3": (628_994, "629.0 K"),
        "prompt": (607_490, "607.5 K"),
        "prefix": (960_770, "960.8 K"),
        "ptuning": (821_506, "821.5 K"),
        "lowrank": (887_042, "887.0 K"),
        "linear": (14_747_906, "14.7 M"),
        "mlp": (8_484_098, "8.5 M"),
    },
    "bart-base": {
        "ft": (139_420_416, "139.4 M"),
        "lora": (442_368, "442.4 K"),
        "adalora": (12_982_272, "13.0 M"),
        "ia3": (36_864, "36.9 K"),
        "prompt": (30_720, "30.7 K"),
        "prefix": (184_320, "184.3 K"),
        "ptuning": (244_736, "244.7 K"),
        "lowrank": (442_368, "442.4 K"),
        "linear": (21_233_664, "21.2 M"),
        "mlp": (11_837_952, "11.8 M"),
    },
    "gpt2": {
        "ft": (124_439_808, "124.4 M"),
        "lora": (294_912, "294.9 K"),
        "adalora": (2_360_064, "2.4 M"),
        "ia3": (36_864, "36.9 K"),
        "prompt": (15_360, "15.4 K"),
        "prefix": (368_640, "368.6 K"),
        "ptuning": (229_376, "229.4 K"),
        "lowrank": (294_912, "294.9 K"),
        "linear": (21_233_664, "21.2 M"),
        "mlp": (8_683_008, "8.7 M"),
    },
    "llama-2-7b": {
        "ft": (6_738_415_616, "6.7 B"),
        "lora": (4_194_304, "4.2 M"),
        "adalora": (33_558_528, "33.6 M"),
        "ia3": (393_216, "393.2 K"),
        "prompt": (81_920, "81.9 K"),
        "prefix": (5_242_880, "5.2 M"),
        "ptuning": (1_151_232, "1.2 M"),
        "lowrank": (4_194_304, "4.2 M"),
        "linear": (1_073_741_824, "1.1 B"),
        "mlp": (103_047_168, "103.0 M"),
    },
    "llama-2-7b all": {
        "lora": (19_988_480, "20.0 M"),
        "adalora": (159_922_176, "159.9 M"),
        "lowrank": (19_988_480, "20.0 M"),
        "linear": (6_476_005_376, "6.5 B"),
        "mlp": (502_665_216, "502.7 M"),
    },
    "linear": {
        "ft": (7_850, "7.9 K"),
        "lora": (6_352, "6.4 K"),
        "lowrank": (6_352, "6.4 K"),
        "linear": (7_850, "7.9 K"),
        "mlp": (136_074, "136.1 K"),
    },
    "mlp": {
        "ft": (136_074, "136.1 K"),
        "lora": (12_496, "12.5 K"),
        "lowrank": (12_496, "12.5 K"),
        "linear": (136_074, "136.1 K"),
        "mlp": (350_218, "350.2 K"),
    },
    "cnn": {
        "ft": (1_554_954, "1.555 M"),
        "lora": (44_184, "44.2 K"),
        "lowrank": (44_184, "44.2 K"),
        "linear": (1_554_954, "1.555 M"),
        "mlp": (538_058, "538.1 K"),
    },
}
CASES = [(model, method) for model, methods in COUNTS.items() for method in methods]
PEFT = {"adalora", "ia3", "prompt", "prefix", "ptuning"}


def cases(*, have_slow: bool) -> list[object]:
    """All cells; test_dry_run.py has those without PEFT, too, and PEFT counts alike everywhere."""
    result = []
    for model, method in CASES:
        is_slow = method not in PEFT or model != "roberta-base"
        marks = [pytest.mark.slow] if have_slow and is_slow else []
        result.append(pytest.param(model, method, id=f"{model}-{method}", marks=marks))
    return result


@functools.cache
def configured(model: str) -> ExperimentConfig:
    return composed("dry_run=true", *MODELS[model]).config


@pytest.mark.parametrize(("model", "method"), cases(have_slow=True))
def test_count_is_exact(monkeypatch, model, method):
    # What a batch would keep is a matter of its own, and takes most of the time.
    monkeypatch.setattr("cola.dry_run.kept_bytes", lambda *_, **__: 0)
    config = configured(model)
    if method in AdapterKind.__members__:
        adapter = dataclasses.replace(config.adapter, kind=AdapterKind[method])
        config = dataclasses.replace(config, adapter=adapter)
    else:
        name = dataclasses.replace(config.method, name=MethodName[method])
        config = dataclasses.replace(config, method=name)
    assert estimate(config).trainable_parameters == COUNTS[model][method][0]


@pytest.mark.parametrize(("model", "method"), cases(have_slow=False))
def test_count_is_the_printed_one(model, method):
    exact, printed = COUNTS[model][method]
    digits, unit = printed.split()
    half = 0.5 * 10 ** -len(digits.partition(".")[2])
    assert abs(exact / UNITS[unit] - float(digits)) <= half * (1 + 1e-9)
