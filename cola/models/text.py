"""Hugging Face base models: pretrained, random from an architecture, or shapes on the meta device.

Losses are computed by the tasks, so no labels ever reach these models.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from cola.config.choices import Family, Objective
from cola.config.schema import ModelConfig
from cola.errors import ConfigError
from cola.models.architecture import (
    auto_class,
    check_objective,
    is_classifier,
    pretrained_config,
    random_config,
)
from cola.models.base import (
    BaseModel,
    cast_parameters,
    model_label,
    seeded_weights,
    stored_names,
    torch_dtype,
)
from cola.models.hub import find_source, loading
from cola.models.new_parameters import absent_names, absent_on_meta, outer_sites
from cola.models.row_streams import with_streams
from cola.models.site_selection import QV, resolve_sites, site_modules
from cola.models.tokenizer import build_word_tokenizer, load_tokenizer
from cola.sites import SiteName
from cola.task_data import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def build_pretrained(
    model: ModelConfig, problem: Problem, *, seed: int, on_meta: bool, device: torch.device
) -> BaseModel:
    """Loads a pretrained model; the seed decides its new heads, drawn on the CPU.

    Raises:
        ConfigError: files are missing or do not fit, or the model does not fit the problem.
        SiteError: `model.sites` cannot be resolved.
    """
    check_objective(model, problem)
    source = find_source(model, config_only=on_meta)
    with loading(model, source):
        config = pretrained_config(model, problem, source, on_meta=on_meta)
        if on_meta:
            module = _shapes(model, problem, config, seed)
            absent = absent_on_meta(module, problem, source)
            return _finish(model, problem, module, tokenizer=None, new_parameters=absent)
        tokenizer = load_tokenizer(
            source.location,
            padding_side=_padding_side(problem),
            local_files_only=source.local_files_only,
        )
        with seeded_weights(seed):
            module, info = auto_class(problem).from_pretrained(
                source.location,
                config=config,
                dtype=torch_dtype(model.dtype),
                local_files_only=source.local_files_only,
                # A head for other labels is replaced; absent_names refuses any other mismatch.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    absent = absent_names(model, problem, module, info)
    module.to(device)
    return _finish(model, problem, module, tokenizer=tokenizer, new_parameters=absent)


def build_random(
    model: ModelConfig, problem: Problem, *, seed: int, on_meta: bool, device: torch.device
) -> BaseModel:
    """Builds an architecture with random weights, a function of the seed alone; all are new.

    Raises:
        ConfigError: the architecture is invalid or does not fit the problem.
        SiteError: `model.sites` cannot be resolved.
    """
    check_objective(model, problem)
    if model.path is not None:
        raise ConfigError(f"model.path has no effect on model={model.name}; use model=hf")
    config = random_config(model, problem)
    tokenizer = None
    if on_meta:
        module = _shapes(model, problem, config, seed)
    else:
        # On a GPU not in float32 first: that is twice the memory of a model that may just fit.
        dtype = torch.float32 if device.type == "cpu" else torch_dtype(model.dtype)
        with seeded_weights(seed, device), device:
            module = auto_class(problem).from_config(config, dtype=dtype)
        cast_parameters(module, model.dtype)
        tokenizer = build_word_tokenizer(
            marks_ends=model.family is not Family.decoder, padding_side=_padding_side(problem)
        )
    return _finish(
        model,
        problem,
        module,
        tokenizer=tokenizer,
        new_parameters=stored_names(module),
        heads=outer_sites(module) if is_classifier(problem) else (),
    )


def _shapes(
    model: ModelConfig, problem: Problem, config: "PreTrainedConfig", seed: int
) -> "PreTrainedModel":
    with seeded_weights(seed), torch.device("meta"):
        module: PreTrainedModel = auto_class(problem).from_config(
            config, dtype=torch_dtype(model.dtype)
        )
    return module


def _finish(
    model: ModelConfig,
    problem: Problem,
    module: Any,  # a PreTrainedModel, whose methods are not typed
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    new_parameters: frozenset[str],
    heads: Collection[SiteName] | None = None,
) -> BaseModel:
    if heads is None:
        heads = [name for name in site_modules(module) if f"{name}.weight" in new_parameters]
    module.config.use_cache = False
    _set_pad_token(module, tokenizer)
    if model.gradient_checkpointing:
        _enable_checkpointing(model, module)
    sites = resolve_sites(module, model, default=QV, heads=heads)
    return BaseModel(
        module=module.eval(),
        tokenizer=tokenizer,
        sites=with_streams(sites, module, problem),
        new_parameters=new_parameters,
        decoder_start_id=_decoder_start(model, problem, module),
    )


def _decoder_start(model: ModelConfig, problem: Problem, module: Any) -> int | None:
    """Token that a decoder writes after; T5 states it, and what lacks one begins with `<s>`."""
    if problem.objective is not Objective.seq2seq:
        return None
    # Old files state it in config.json, newer ones in generation_config.json.
    places = [module.generation_config, module.config]
    names = ["decoder_start_token_id", "bos_token_id"]
    found = [getattr(place, name, None) for name in names for place in places]
    start: int | None = next((token for token in found if token is not None), None)
    if start is None:
        raise ConfigError(
            f"{model_label(model)} names no token for its decoder to start from; set "
            "decoder_start_token_id in its config.json"
        )
    return start


def _enable_checkpointing(model: ModelConfig, module: Any) -> None:
    if not module.supports_gradient_checkpointing:
        raise ConfigError(f"model.gradient_checkpointing: {model_label(model)} does not support it")
    # transformers 5.23 renamed the method, and a warning is an error in tests.
    enable = getattr(module, "activation_checkpointing_enable", None)
    # Reentrant checkpointing fails on a frozen base: no input of a block needs a gradient.
    (enable or module.gradient_checkpointing_enable)({"use_reentrant": False})


def _set_pad_token(module: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> None:
    # After building, not before: an embedding built with a pad index never learns that row, and
    # the pad token may be the end token.
    config = module.config
    if tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id
    elif config.pad_token_id is None:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else end


def _padding_side(problem: Problem) -> str:
    return "left" if problem.objective is Objective.causal else "right"
