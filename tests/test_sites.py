"""`model.sites`: the words qv and all, on the command line and against every kind of model."""

from typing import Any

import pytest

from cola.config.overrides import check_overrides
from cola.errors import ConfigError, SiteError
from cola.models import BaseModel, build_base_model, shared_parameter_sites
from tests.configs import composed
from tests.models import image_problem, model_of, text_problem

OBJECTIVES = {
    "bart-base": "seq2seq",
    "gpt2": "causal",
    "llama-2-7b": "causal",
    "roberta-base": "classification",
    "tiny-bart": "seq2seq",
}


def shapes(name: str, *sites: str, **settings: Any) -> BaseModel:
    problem = text_problem(OBJECTIVES[name])
    model = model_of(name, sites=list(sites) or None, **settings)
    return build_base_model(model, problem, seed=0, on_meta=True)


def parts(base: BaseModel) -> set[str]:
    return {name.rpartition(".")[2] for name, spec in base.sites.items() if not spec.is_head}


@pytest.mark.parametrize(
    ("name", "num", "last_parts"),
    [
        ("bart-base", 36, {"q_proj", "v_proj"}),
        ("gpt2", 12, {"c_attn"}),
        ("llama-2-7b", 64, {"q_proj", "v_proj"}),
        ("roberta-base", 26, {"query", "value"}),
    ],
)
def test_qv_is_the_attention_and_the_default(name: str, num: int, last_parts: set[str]) -> None:
    base = shapes(name, "qv")
    assert (len(base.sites), parts(base)) == (num, last_parts)
    assert shapes(name).sites == base.sites
    own = build_base_model(model_of(name), text_problem(OBJECTIVES[name]), seed=0, on_meta=True)
    assert own.sites == base.sites  # as the paper does


def test_qv_of_bart_is_six_times_encoder_decoder_and_across() -> None:
    names = list(shapes("bart-base", "qv").sites)
    for part in ("encoder.layers.*.self_attn", "decoder.layers.*.self_attn", "encoder_attn"):
        first, _, last = part.partition("*")
        assert sum(first in name and last in name for name in names) == 12


@pytest.mark.parametrize(
    ("name", "num"), [("bart-base", 96), ("gpt2", 48), ("llama-2-7b", 224), ("roberta-base", 74)]
)
def test_all_is_every_layer_but_the_output(name: str, num: int) -> None:
    base = shapes(name, "all")
    assert len(base.sites) == num
    assert not {"lm_head", "embed_tokens", "wte", "shared"} & parts(base)
    assert not shared_parameter_sites(base.module, base.sites)


def test_all_leaves_new_heads_to_be_heads() -> None:
    heads = [name for name, spec in shapes("roberta-base", "all").sites.items() if spec.is_head]
    assert heads == ["classifier.dense", "classifier.out_proj"]


def test_words_and_names_may_be_mixed() -> None:
    assert parts(shapes("tiny-bart", "qv", "fc1")) == {"q_proj", "v_proj", "fc1"}
    assert shapes("tiny-bart", "all", "fc1").sites == shapes("tiny-bart", "all").sites


def test_all_of_an_image_model_is_what_it_adapts_anyway() -> None:
    problem = image_problem(1, 8, 8)
    default, named = (
        build_base_model(model_of("cnn", sites=sites), problem, seed=0, on_meta=True).sites
        for sites in (None, ["all"])
    )
    assert default == named
    with pytest.raises(SiteError, match=r"qv.*names attention layers, and mlp has none; set model"):
        build_base_model(model_of("mlp", sites=["qv"]), problem, seed=0)


def test_qv_of_an_unknown_type_asks_for_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils import constants

    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.delitem(known, "bart")
    with pytest.raises(SiteError, match=r"qv means nothing yet for tiny-bart.*to all or.*k_proj"):
        shapes("tiny-bart", "qv")


# On the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("model.sites=all", "model.sites=[all]"),
        ("model.sites=*.attention.*", "model.sites=[*.attention.*]"),
        ("model.sites=[qv,o_proj]", "model.sites=[qv,o_proj]"),
        ("model.sites=null", "model.sites=null"),
        ("model.sites=${task.labels}", "model.sites=${task.labels}"),
        ("+model.sites=all", "model.sites=[all]"),
        ("adapter.hidden=128", "adapter.hidden=[128]"),
        ("tracking.tags='one, two'", "tracking.tags=['one, two']"),
        ("optimizer.lr=1", "optimizer.lr=1"),
    ],
)
def test_plain_value_of_a_list_is_a_list_of_one(line: str, wanted: str) -> None:
    assert check_overrides([line]).lines == [wanted]


def test_plain_values_of_a_sweep_are_lists_of_one() -> None:
    lines = ["model.sites=qv,all,[k_proj,o_proj]", "adapter.hidden=8,[8,16]"]
    assert check_overrides(lines, is_sweep=True).lines == [
        "model.sites=[qv],[all],[k_proj,o_proj]",
        "adapter.hidden=[8],[8,16]",
    ]


@pytest.mark.parametrize("value", ["", "{a:1}"])
def test_what_is_no_list_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.sites=.*: wrong value; allowed: a list, each"):
        check_overrides([f"model.sites={value}"])
    with pytest.raises(ConfigError, match=r"adapter\.hidden=\[wide\]: wrong value; allowed: a lis"):
        check_overrides(["adapter.hidden=wide"])


def test_composed_sites_are_a_list() -> None:
    assert composed("task=glue", "model.sites=all").config.model.sites == ["all"]
