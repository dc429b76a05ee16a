import logging
import ssl
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import torch
from torch import Tensor

from cola.config.choices import DType
from cola.errors import ConfigError, SiteError
from cola.models import (
    BaseModel,
    build_base_model,
    check_rank,
    resolve_family,
    resolve_sites,
    shared_parameter_sites,
)
from cola.models.hub import hub_answers
from cola.models.site_selection import attention_sites
from cola.sites import SiteKind
from cola.task_data import Problem
from tests.models import image_problem, model_of, text_problem

IMAGE_MODELS = ["linear", "mlp", "cnn"]


def _weights(base: BaseModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in base.module.state_dict().items()}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa encoder without a head, saved as a pretrained model would be."""
    folder = tmp_path_factory.mktemp("encoder")
    base = build_base_model(model_of("tiny-roberta"), text_problem(), seed=7)
    base.module.roberta.save_pretrained(folder)
    assert base.tokenizer is not None
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose configuration and tokenizer know no pad token, as the real one."""
    folder = tmp_path_factory.mktemp("decoder")
    base = build_base_model(model_of("tiny-gpt2"), text_problem("causal"), seed=7)
    base.module.config.pad_token_id = None
    base.module.generation_config.pad_token_id = None
    base.module.save_pretrained(folder)
    assert base.tokenizer is not None
    base.tokenizer.pad_token = None
    base.tokenizer.save_pretrained(folder)
    return folder


# Shapes ------------------------------------------------------------------------------------------


def test_roberta_base_on_meta_has_26_sites() -> None:
    base = build_base_model(model_of("roberta-base"), text_problem(), seed=0, on_meta=True)
    heads = [spec for spec in base.sites.values() if spec.is_head]
    inner = [spec for spec in base.sites.values() if not spec.is_head]
    assert len(base.sites) == 26
    assert list(base.sites)[:2] == [
        f"roberta.encoder.layer.0.attention.self.{part}" for part in ("query", "value")
    ]
    assert all((spec.in_features, spec.out_features) == (768, 768) for spec in inner)
    assert not any(spec.adapter_bias for spec in inner)
    assert [(head.name, head.in_features, head.out_features) for head in heads] == [
        ("classifier.dense", 768, 768),
        ("classifier.out_proj", 768, 2),
    ]
    assert all(head.adapter_bias for head in heads)
    assert base.num_parameters == 124_647_170
    assert base.tokenizer is None
    assert base.new_parameters == {
        f"{head.name}.{part}" for head in heads for part in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("linear", (1, 28, 28), [(784, 10)]),
        ("linear", (3, 32, 32), [(3072, 10)]),
        ("mlp", (1, 28, 28), [(784, 128), (128, 256), (256, 10)]),
        ("mlp", (3, 32, 32), [(3072, 128), (128, 256), (256, 10)]),
        ("cnn", (1, 28, 28), [(1, 64), (64, 128), (128, 256), (256, 512), (512, 10)]),
        ("cnn", (3, 32, 32), [(3, 64), (64, 128), (128, 256), (256, 512), (512, 10)]),
    ],
)
def test_image_model_adapts_every_layer(
    name: str, shape: tuple[int, int, int], sizes: list[tuple[int, int]]
) -> None:
    base = build_base_model(model_of(name), image_problem(*shape), seed=0, on_meta=True)
    specs = list(base.sites.values())
    assert [(spec.in_features, spec.out_features) for spec in specs] == sizes
    assert all(spec.adapter_bias and not spec.is_head for spec in specs)
    assert [spec.kind for spec in specs[:-1]] == [
        SiteKind.conv2d if name == "cnn" else SiteKind.linear
    ] * (len(specs) - 1)
    assert base.new_parameters == set(base.module.state_dict())


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_model_scores_small_digits(name: str) -> None:
    base = build_base_model(model_of(name), image_problem(1, 8, 8), seed=0)
    assert base.module(pixels=torch.zeros(3, 1, 8, 8)).logits.shape == (3, 10)


def test_cnn_halves_after_all_but_the_last_convolution() -> None:
    base = build_base_model(model_of("cnn"), image_problem(1, 8, 8), seed=0)
    shapes = []
    for index in range(1, 5):
        base.module.get_submodule(f"conv{index}").register_forward_hook(
            lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:]))
        )
    base.module(pixels=torch.zeros(1, 1, 8, 8))
    assert shapes == [(64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)]


def test_answers_of_convolutions_lie_channels_last() -> None:
    base = build_base_model(model_of("cnn"), image_problem(3, 16, 16), seed=0)
    answers: list[torch.Tensor] = []
    for index in range(1, 4):  # the fourth's are of one pixel, which lie either way
        base.module.get_submodule(f"conv{index}").register_forward_hook(
            lambda _module, _inputs, output: answers.append(output)
        )
    base.module(pixels=torch.zeros(2, 3, 16, 16))
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in answers] == [True] * 3
    assert not any(x.is_contiguous() for x in answers)


# Seeds and dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mlp", image_problem(1, 8, 8)),
        ("cnn", image_problem(1, 8, 8)),
        ("tiny-roberta", text_problem()),
        ("tiny-gpt2", text_problem("causal")),
    ],
)
def test_random_weights_come_from_the_seed_alone(
    name: str, problem: Problem, *, on_meta: bool
) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = _weights(build_base_model(model_of(name), problem, seed=3, on_meta=on_meta))
    assert torch.equal(torch.get_rng_state(), state)
    if on_meta:
        assert all(value.is_meta for value in first.values())
        return
    torch.manual_seed(2)
    second = _weights(build_base_model(model_of(name), problem, seed=3))
    other = _weights(build_base_model(model_of(name), problem, seed=4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "problem"), [("mlp", image_problem(1, 8, 8)), ("tiny-gpt2", text_problem("causal"))]
)
@pytest.mark.parametrize("dtype", list(DType))
def test_dtypes_share_weights(name: str, problem: Problem, dtype: DType) -> None:
    single = _weights(build_base_model(model_of(name), problem, seed=3))
    base = build_base_model(model_of(name, dtype=dtype), problem, seed=3)
    for key, parameter in base.module.named_parameters():
        assert parameter.dtype is getattr(torch, dtype.name)
        assert torch.equal(parameter, single[key].to(parameter.dtype))
    assert base.num_parameters == sum(value.numel() for value in base.module.parameters())


# Pretrained models -------------------------------------------------------------------------------


def test_heads_are_the_keys_that_the_file_lacks(
    encoder_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        base = build_base_model(model_of("hf", path=str(encoder_folder)), text_problem(), seed=0)
    heads = [name for name, spec in base.sites.items() if spec.is_head]
    assert heads == ["classifier.dense", "classifier.out_proj"]
    assert len(base.sites) == 6
    assert base.new_parameters == {
        f"{head}.{part}" for head in heads for part in ("weight", "bias")
    }
    assert "newly initialised" in caplog.text
    assert "classifier.dense.bias" in caplog.text


def test_new_head_of_pretrained_model_comes_from_the_seed_alone(encoder_folder: Path) -> None:
    model = model_of("hf", path=str(encoder_folder), sites=["query"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_base_model(model, text_problem(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = _weights(build_base_model(model, text_problem(), seed=3))
    other = _weights(build_base_model(model, text_problem(), seed=4))
    for key, value in _weights(first).items():
        assert torch.equal(value, second[key])
        is_random_weight = key in first.new_parameters and key.endswith("weight")
        assert torch.equal(value, other[key]) is not is_random_weight


def test_head_of_another_size_is_new_and_one_that_fits_is_not(tmp_path: Path) -> None:
    tuned = build_base_model(model_of("tiny-roberta"), text_problem(), seed=7)
    tuned.module.save_pretrained(tmp_path)
    assert tuned.tokenizer is not None
    tuned.tokenizer.save_pretrained(tmp_path)
    model = model_of("hf", path=str(tmp_path))
    for on_meta in (False, True):
        same = build_base_model(model, text_problem(), seed=0, on_meta=on_meta)
        assert len(same.sites) == 4
        assert not same.new_parameters
        larger = build_base_model(model, text_problem(num_labels=3), seed=0, on_meta=on_meta)
        assert [name for name, spec in larger.sites.items() if spec.is_head] == [
            "classifier.out_proj"
        ]
        assert larger.sites["classifier.out_proj"].out_features == 3
        assert larger.new_parameters == {"classifier.out_proj.weight", "classifier.out_proj.bias"}


def test_dry_run_of_folder_needs_its_config_only(encoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((encoder_folder / "config.json").read_text())
    model = model_of("hf", path=str(tmp_path))
    dry = build_base_model(model, text_problem(), seed=0, on_meta=True)
    real = build_base_model(model_of("hf", path=str(encoder_folder)), text_problem(), seed=0)
    assert dry.sites == real.sites
    assert dry.new_parameters == real.new_parameters
    assert dry.num_parameters == real.num_parameters


def test_decoder_without_pad_token_pads_with_its_end(decoder_folder: Path) -> None:
    model = model_of("hf", path=str(decoder_folder))
    for objective, side in (("causal", "left"), ("classification", "right")):
        base = build_base_model(model, text_problem(objective), seed=0)
        assert base.tokenizer is not None
        assert base.tokenizer.pad_token == base.tokenizer.eos_token
        assert base.tokenizer.padding_side == side
        rows = base.tokenizer(["the fox", "a bear by the drill"], padding=True, return_tensors="pt")
        assert base.module(**rows).logits.shape[0] == 2
    dry = build_base_model(model, text_problem(), seed=0, on_meta=True)
    assert dry.module.config.pad_token_id == 3


def test_gradient_checkpointing_is_not_reentrant() -> None:
    model = model_of("tiny-gpt2", gradient_checkpointing=True)
    base = build_base_model(model, text_problem("causal"), seed=0)
    checkpoint = base.module.transformer._gradient_checkpointing_func
    assert base.module.transformer.gradient_checkpointing
    assert checkpoint.keywords == {"use_reentrant": False}
    assert base.module.config.use_cache is False


# Tokenizer ---------------------------------------------------------------------------------------


def test_word_tokenizer_of_encoder_marks_ends_and_knows_unknown_words() -> None:
    tokenizer = build_base_model(model_of("tiny-roberta"), text_problem(), seed=0).tokenizer
    assert tokenizer is not None
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<unk>", "<s>", "</s>"]
    rows = tokenizer(["The FOX, quizzed", "a"], padding=True)
    assert rows.keys() == {"input_ids", "attention_mask"}
    assert tokenizer.convert_ids_to_tokens(rows["input_ids"][0]) == [
        *("<s>", "the", "fox", "<unk>", "<unk>", "</s>"),
    ]
    assert rows["attention_mask"][1] == [1, 1, 1, 0, 0, 0]


def test_word_tokenizer_of_decoder_pads_left_without_marks() -> None:
    base = build_base_model(model_of("tiny-gpt2"), text_problem("causal"), seed=0)
    assert base.tokenizer is not None
    rows = base.tokenizer(["the fox", "a"], padding=True)
    assert rows["input_ids"][1][0] == base.tokenizer.pad_token_id
    assert base.tokenizer.decode(rows["input_ids"][0]) == "the fox"
    assert base.module.config.vocab_size == len(base.tokenizer)


# Site selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "num_inner"),
    [
        (["query"], 2),
        (["attention.self.query", "key"], 4),
        (["roberta.encoder.layer.1.output.dense"], 1),
        (["*.layer.0.attention.*"], 4),
        (["que*"], 2),
        ([], 0),
        (["classifier.dense"], 0),
    ],
)
def test_sites_are_selected_by_name_suffix_or_pattern(entries: list[str], num_inner: int) -> None:
    base = build_base_model(
        model_of("tiny-roberta", sites=entries), text_problem(), seed=0, on_meta=True
    )
    assert len(base.sites) == num_inner + 2
    order = [name for name, _ in base.module.named_modules() if name in base.sites]
    assert list(base.sites) == order


def test_default_sites_are_those_of_the_model_type() -> None:
    base = build_base_model(
        model_of("tiny-gpt2", sites=None), text_problem("causal"), seed=0, on_meta=True
    )
    assert [name.rpartition(".")[2] for name in base.sites] == ["c_attn", "c_attn"]
    assert {spec.kind for spec in base.sites.values()} == {SiteKind.conv1d}
    assert {(spec.in_features, spec.out_features) for spec in base.sites.values()} == {(64, 192)}


def test_default_sites_may_be_a_regular_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils import constants

    mapping = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    monkeypatch.setitem(getattr(constants, mapping), "made-up", r"linear[12]")
    module = build_base_model(model_of("mlp"), image_problem(1, 8, 8), seed=0).module
    module.config = SimpleNamespace(model_type="made-up")
    assert attention_sites(module, model_of("mlp")) == ["linear1", "linear2"]


def test_module_with_two_names_is_one_site() -> None:
    module = torch.nn.Module()
    module.first = torch.nn.Linear(2, 2)
    module.second = module.first
    sites = resolve_sites(module, model_of("mlp", sites=["second"]))
    assert list(sites) == ["first"]
    assert not shared_parameter_sites(module, sites)


def test_tied_lm_head_is_a_shared_site() -> None:
    model = model_of("tiny-gpt2", sites=["c_attn", "lm_head"])
    for on_meta in (False, True):
        base = build_base_model(model, text_problem("causal"), seed=0, on_meta=on_meta)
        assert shared_parameter_sites(base.module, base.sites) == ("lm_head",)
        assert "lm_head.weight" not in base.new_parameters


def test_rank_is_checked_against_sites_that_are_no_heads() -> None:
    text = build_base_model(model_of("tiny-roberta"), text_problem(), seed=0, on_meta=True)
    check_rank(text.sites, 64)
    with pytest.raises(ConfigError, match=r"adapter\.rank=65 .* and 1 more; .* at most 64"):
        check_rank(text.sites, 65)
    image = build_base_model(model_of("cnn"), image_problem(1, 28, 28), seed=0, on_meta=True)
    check_rank(image.sites, 9)
    with pytest.raises(ConfigError, match=r"smaller side of conv1 \(9\); set .* at most 9"):
        check_rank(image.sites, 10)


# Messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "q_prj",
            r"model\.sites=\['q_prj'\] match no module of roberta-base; "
            r"nearest: query, key; set model\.sites to one of them",
        ),
        ("LayerNorm", "match only LayerNorm in roberta-base; adapters attach to Linear"),
    ],
)
def test_site_entry_that_cannot_be_used_is_named(entry: str, message: str) -> None:
    model = model_of("roberta-base", sites=["value", entry])
    with pytest.raises(SiteError, match=message):
        build_base_model(model, text_problem(), seed=0, on_meta=True)


def test_nothing_to_adapt_is_an_error() -> None:
    with pytest.raises(SiteError, match="tiny-gpt2 has no site"):
        build_base_model(
            model_of("tiny-gpt2", sites=[]), text_problem("causal"), seed=0, on_meta=True
        )


def test_model_type_without_default_sites_is_named() -> None:
    model = model_of("tiny-roberta", sites=None)
    model.architecture = {"model_type": "xlnet", "d_model": 8, "n_layer": 1, "n_head": 2}
    with pytest.raises(
        SiteError, match=r"qv means nothing yet for tiny-roberta.*set model\.sites to all or"
    ):
        build_base_model(model, replace(text_problem(), max_length=8), seed=0, on_meta=True)


@pytest.mark.parametrize(
    ("name", "settings", "problem", "message"),
    [
        ("hf", {}, text_problem(), r"model=hf needs model\.path=HUB_ID or model\.path=FOLDER"),
        (
            "hf",
            {"path": "/no/such"},
            text_problem(),
            r"model\.path=/no/such: there is no such folder",
        ),
        ("hf", {"path": "a/b/c"}, text_problem(), "there is no such folder"),
        (
            "tiny-roberta",
            {"path": "x"},
            text_problem(),
            r"model\.path has no effect on model=tiny-rob",
        ),
        ("tiny-roberta", {}, text_problem("causal"), "tiny-roberta is no decoder.*tiny-gpt2"),
        (
            "tiny-roberta",
            {},
            image_problem(1, 8, 8),
            "reads text, but the task has images.*model=mlp",
        ),
        (
            "tiny-gpt2",
            {},
            replace(text_problem("causal"), max_length=513),
            r"task\.max_length=513 exceeds the 512 positions of tiny-gpt2",
        ),
        ("tiny-gpt2", {"architecture": {}}, text_problem("causal"), "tiny-gpt2 has no model_type"),
        (
            "tiny-gpt2",
            {"architecture": {"model_type": "gtp2"}},
            text_problem("causal"),
            r"model\.architecture of tiny-gpt2 is invalid",
        ),
        (
            "tiny-gpt2",
            {"architecture": {"model_type": "vit"}, "family": None},
            text_problem(),
            "model type 'vit' cannot classify text",
        ),
        ("mlp", {}, text_problem(), "model=mlp takes images, but the task is classification"),
        ("mlp", {"path": "x"}, image_problem(1, 8, 8), r"model\.path has no effect on model=mlp"),
        (
            "mlp",
            {"gradient_checkpointing": True},
            image_problem(1, 8, 8),
            r"model\.gradient_checkpointing has no effect",
        ),
        (
            "mlp",
            {"architecture": {"model_type": "mpl"}},
            image_problem(1, 8, 8),
            r"model_type='mpl' is no image model; choose from linear, mlp, cnn",
        ),
        (
            "mlp",
            {"architecture": {"model_type": "mlp", "widths": [3]}},
            image_problem(1, 8, 8),
            r"takes \['hidden'\], given: \['widths'\]",
        ),
        ("cnn", {}, image_problem(1, 7, 7), "images of 7 x 7 are too small for 3 halvings"),
    ],
)
@pytest.mark.parametrize("on_meta", [False, True])
def test_impossible_model_is_refused_with_the_reason(
    name: str, settings: dict[str, Any], problem: Problem, message: str, *, on_meta: bool
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_base_model(model_of(name, **settings), problem, seed=0, on_meta=on_meta)


def test_hub_out_of_reach_names_what_works_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_settings: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("cola.models.hub.urlopen", refuse)
    model = model_of("hf", path="nobody/nothing")
    with pytest.raises(ConfigError, match=r"hub was not reached.*model\.path=FOLDER.*task=digits"):
        build_base_model(model, text_problem(), seed=0)


def _refuse_like_transformers(monkeypatch: pytest.MonkeyPatch, refusal: type[Exception]) -> None:
    """The hub answers, refuses, and the library wraps that in its own words."""
    from transformers import AutoConfig

    def load(*_args: object, **_settings: object) -> None:
        response = SimpleNamespace(headers={}, request=None)
        try:
            raise refusal("403 Client Error", response=response)  # type: ignore[call-arg]
        except refusal as error:
            raise OSError("a long explanation\nof the library") from error

    monkeypatch.setattr("cola.models.hub.hub_answers", lambda: True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", load)


@pytest.mark.parametrize(
    ("refusal", "token", "message"),
    [
        (
            "GatedRepoError",
            None,
            r"meta-llama/Llama-2-7b-hf is gated: accept its licence at "
            r"https://huggingface\.co/meta-llama/Llama-2-7b-hf, then run hf auth login or set "
            r"HF_TOKEN; or use model\.path=FOLDER",
        ),
        (
            "GatedRepoError",
            "hf_x",
            r"is gated: accept its licence at https://huggingface\.co/meta-llama/Llama-2-7b-hf, "
            r"with the account of the token in use, and wait until access is granted.*FOLDER",
        ),
        ("RepositoryNotFoundError", None, r"without a token one sees no such model.*spelling.*log"),
        ("RepositoryNotFoundError", "hf_x", r"the token in use sees no such model on the hub"),
    ],
)
@pytest.mark.parametrize("use", ["family", "build"])
def test_hub_that_refuses_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, refusal: str, token: str | None, message: str, use: str
) -> None:
    import huggingface_hub

    _refuse_like_transformers(monkeypatch, getattr(huggingface_hub.errors, refusal))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    model = model_of("llama-2-7b", family=None)
    calls: dict[str, Callable[[], object]] = {
        "family": lambda: resolve_family(model),
        "build": lambda: build_base_model(model, text_problem("causal"), seed=0),
    }
    with pytest.raises(ConfigError, match=message):
        calls[use]()


@pytest.mark.parametrize(
    ("answer", "is_reached"),
    [
        (HTTPError("https://hub", 503, "busy", None, None), True),  # type: ignore[arg-type]
        (URLError(ssl.SSLError("unknown authority")), True),
        (URLError("no route"), False),
        (TimeoutError(), False),
    ],
)
def test_hub_is_reached_if_anything_answers(
    monkeypatch: pytest.MonkeyPatch, answer: Exception, *, is_reached: bool
) -> None:
    def respond(*_args: object, **_settings: object) -> None:
        raise answer

    monkeypatch.setattr("cola.models.hub.urlopen", respond)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert hub_answers() is is_reached
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub_answers()


def _drop(*patterns: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return drop


def _truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs")


def _rename_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({f"x.{name}": value for name, value in load_file(path).items()}, path)


def _widen(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": ', '"vocab_size": 1'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop("config.json"), r"lacks config\.json; save the model"),
        (_drop("*.safetensors"), r"lacks weights \(\*\.safetensors or pytorch_model\.bin\)"),
        (_drop("tokenizer*"), r"lacks tokenizer \(tokenizer\.json or a vocabulary\)"),
        (_truncate, "cannot be loaded: "),
        (_rename_tensors, r"the weights do not fit config\.json; of the 37 tensors .* 37 are"),
        (
            _widen,
            r"the weights do not fit config\.json; .* roberta\.embeddings\.word_embeddings",
        ),
    ],
)
def test_damaged_folder_is_named_with_what_is_wrong(
    encoder_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    for path in encoder_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message) as raised:
        build_base_model(model_of("hf", path=str(tmp_path)), text_problem(), seed=0)
    assert str(tmp_path) in str(raised.value)


def test_missing_base_tensor_is_warned_about(
    encoder_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    for path in encoder_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.0.attention.self.key.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    base = build_base_model(model_of("hf", path=str(tmp_path)), text_problem(), seed=0)
    assert "hence random: roberta.encoder.layer.0.attention.self.key.weight" in caplog.text
    assert "roberta.encoder.layer.0.attention.self.key.weight" in base.new_parameters


def test_model_without_gradient_checkpointing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.GPT2PreTrainedModel.supports_gradient_checkpointing", False)
    model = model_of("tiny-gpt2", gradient_checkpointing=True)
    with pytest.raises(ConfigError, match=r"checkpointing: tiny-gpt2 does not support it"):
        build_base_model(model, text_problem("causal"), seed=0)


def test_masked_model_is_no_decoder(encoder_folder: Path) -> None:
    with pytest.raises(ConfigError, match="is no decoder, but the task predicts next tokens"):
        build_base_model(model_of("hf", path=str(encoder_folder)), text_problem("causal"), seed=0)


@pytest.mark.slow
def test_image_models_import_neither_transformers_nor_peft() -> None:
    script = (
        "import sys\n"
        "from cola.config.choices import ModelSource, Objective\n"
        "from cola.config.schema import ModelConfig\n"
        "from cola.models import build_base_model, check_rank\n"
        "from cola.task_data import Problem\n"
        "model = ModelConfig(name='linear', source=ModelSource.image,\n"
        "                    architecture={'model_type': 'linear'})\n"
        "problem = Problem(objective=Objective.image, num_labels=10, image_shape=(1, 8, 8),\n"
        "                  max_length=0)\n"
        "check_rank(build_base_model(model, problem, seed=0).sites, 8)\n"
        "assert not {'transformers', 'tokenizers', 'peft', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
