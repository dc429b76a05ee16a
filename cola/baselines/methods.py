"""Baselines of the PEFT library: AdaLoRA, IA3, prompt tuning, prefix tuning and p-tuning.

Builds what `AutogradLearner` trains. Heads of classifiers train whole, from the same initial values
as with every other method. LoRA is set up apart (`lora.py`), as the mirror of the low-rank adapter.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cola.baselines.adalora import RankBudget
from cola.baselines.folder import save_peft_folder
from cola.baselines.virtual_tokens import (
    VirtualTokenModel,
    num_positions,
    start_from_text,
    takes_prefix,
)
from cola.config.choices import Family, MethodName, Objective
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError, SiteError
from cola.export import TASK_TYPES, head_names
from cola.generation import resolve_decoding
from cola.models import BaseModel, resolve_family, resolve_sites
from cola.models.base import model_label, seeded_weights
from cola.sites import SiteKind, SiteSpec
from cola.task_data import Problem

if TYPE_CHECKING:
    from peft import PeftConfig

VIRTUAL_TOKEN_METHODS = (MethodName.prompt, MethodName.prefix, MethodName.ptuning)

_SAVED_BY_PEFT = ("classifier", "score")
# The paper's counts of AdaLoRA are those of the library's default targets, but for Llama-2, where
# the (All) row adapts all linear layers as every other method does.
_ADALORA_ADAPTS_SITES = {"llama"}


@dataclass(frozen=True, kw_only=True)
class PeftMethod:
    """What a baseline of the PEFT library trains.

    Attributes:
        model: called and trained like the base model, which is inside it.
        trainable: parameters by name in `model`.
        ranks: AdaLoRA's budget, None for the others.
        save: writes a folder that `PeftModel.from_pretrained` loads onto the same base model.
    """

    model: nn.Module
    trainable: dict[str, nn.Parameter]
    ranks: RankBudget | None
    save: Callable[[Path], None]


def build_peft_method(
    config: ExperimentConfig, base: BaseModel, objective: Objective, *, adaptations: int
) -> PeftMethod:
    """Sets the configured method up on a base model, which is changed in place.

    Args:
        config: its method is one of PEFT's other than LoRA.
        base: on its device; on the meta device for parameter counts alone.
        objective: what the loss scores.
        adaptations: of the whole run, AdaLoRA's horizon.

    Raises:
        ConfigError: the model cannot take virtual tokens, or not so many.
        SiteError: the targets are not in the model, or nobody knows them.
    """
    from peft import get_peft_model

    module, name = base.module, config.method.name
    head_modules = [] if objective.writes else head_names(module, base.sites.values())
    heads: dict[str, nn.Parameter] = {}
    if name in VIRTUAL_TOKEN_METHODS:  # of these PEFT trains copies of the heads
        _check_virtual_tokens(config, module, objective)
        settings = _virtual_token_settings(config, module, objective, head_modules)
    else:
        heads = _parameters(module, head_modules)
        settings = _target_settings(config, _targets(config, base), adaptations)
    is_meta = next(module.parameters()).is_meta
    with seeded_weights(config.seed):
        peft_model: Any = get_peft_model(module, settings, low_cpu_mem_usage=is_meta)
    if name is MethodName.prompt and base.tokenizer is not None:
        start_from_text(peft_model, base.tokenizer, config.method.init_text)
    model = module
    if name in VIRTUAL_TOKEN_METHODS:
        model = VirtualTokenModel(peft_model, is_causal=objective is Objective.causal)
    return PeftMethod(
        model=model,
        trainable=_trainable(model, heads),
        ranks=RankBudget(peft_model.base_model) if name is MethodName.adalora else None,
        save=partial(
            save_peft_folder,
            peft_model=peft_model,
            heads=heads,
            base=config.model.path or config.model.name,
            task_type=TASK_TYPES[objective],
        ),
    )


def _parameters(module: nn.Module, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    return {
        f"{part}.{key}": parameter
        for part in parts
        for key, parameter in module.get_submodule(part).named_parameters()
    }


def _trainable(model: nn.Module, heads: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What PEFT leaves trainable, and the heads, which it has frozen."""
    whole = {id(parameter) for parameter in heads.values()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad or id(parameter) in whole)
        and ".ranknum." not in name  # AdaLoRA's constant
    }


def _virtual_token_settings(
    config: ExperimentConfig, module: Any, objective: Objective, heads: Sequence[str]
) -> "PeftConfig":
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    method = config.method
    shared: dict[str, Any] = {
        "task_type": TASK_TYPES[objective],
        "num_virtual_tokens": method.virtual_tokens,
        # PEFT looks for them by names that not every architecture uses.
        "num_layers": module.config.num_hidden_layers,
        "num_attention_heads": module.config.num_attention_heads,
        "token_dim": module.config.hidden_size,
        "modules_to_save": [name for name in heads if not name.endswith(_SAVED_BY_PEFT)] or None,
    }
    if method.name is MethodName.prefix:
        return PrefixTuningConfig(**shared, prefix_projection=False)
    # Some models project their embeddings to the size of their layers.
    shared["token_dim"] = module.get_input_embeddings().embedding_dim
    if method.name is MethodName.prompt:
        return PromptTuningConfig(**shared)
    return PromptEncoderConfig(
        **shared, encoder_reparameterization_type="MLP", encoder_hidden_size=method.encoder_hidden
    )


def _target_settings(
    config: ExperimentConfig, targets: Collection[SiteSpec], adaptations: int
) -> "PeftConfig":
    from peft import AdaLoraConfig, IA3Config

    method = config.method
    shared: dict[str, Any] = {
        # A string is matched as a whole: a list would also match names that merely end alike.
        "target_modules": "|".join(re.escape(spec.name) for spec in targets),
        "fan_in_fan_out": any(spec.kind is SiteKind.conv1d for spec in targets),
    }
    if method.name is MethodName.ia3:
        return IA3Config(**shared, feedforward_modules=[])
    return AdaLoraConfig(
        **shared,
        init_r=method.init_rank,
        target_r=method.target_rank,
        beta1=method.beta,
        beta2=method.beta,
        deltaT=method.delta_t,
        # Rounded down, so that even a run of one adaptation has a step to reach its budget in.
        tinit=int(method.init_ratio * adaptations),
        tfinal=int(method.final_ratio * adaptations),
        total_step=adaptations,
        orth_reg_weight=method.orth_weight,
    )


def _targets(config: ExperimentConfig, base: BaseModel) -> Collection[SiteSpec]:
    """Modules that AdaLoRA or IA3 adapts."""
    from peft.utils import constants

    method, module = config.method, base.module
    model_type: str = module.config.model_type  # type: ignore[union-attr, assignment]
    if method.sites is not None:
        return _resolve(config, base, method.sites)
    if method.name is MethodName.adalora and model_type in _ADALORA_ADAPTS_SITES:
        return [spec for spec in base.sites.values() if not spec.is_head]
    known: dict[str, list[str]] = getattr(
        constants, f"TRANSFORMERS_MODELS_TO_{method.name.name.upper()}_TARGET_MODULES_MAPPING"
    )
    if model_type not in known:
        raise SiteError(
            f"method={method.name.name}: PEFT knows no targets for {model_label(config.model)} of "
            f"model type {model_type!r}; set method.sites to parts of module names"
        )
    return _resolve(config, base, known[model_type])


def _resolve(
    config: ExperimentConfig, base: BaseModel, entries: Sequence[str]
) -> Collection[SiteSpec]:
    chosen = dataclasses.replace(config.model, sites=list(entries))
    try:
        return resolve_sites(base.module, chosen).values()
    except SiteError as error:  # which speaks of the key that sites usually come from
        raise SiteError(str(error).replace("model.sites", "method.sites")) from error


def _check_virtual_tokens(config: ExperimentConfig, module: Any, objective: Objective) -> None:
    method, label = config.method.name.name, model_label(config.model)
    if not objective.writes:
        family = resolve_family(config.model, on_meta=config.dry_run)
        if family not in (None, Family.encoder):
            raise ConfigError(
                f"method={method} with {label}, a {family.name} that classifies by its last "
                "token, which is not found behind virtual tokens; use an encoder, or method=lora, "
                "adalora or ia3"
            )
    if config.method.name is MethodName.prefix and not takes_prefix(module):
        raise ConfigError(
            f"method=prefix: {label} takes no keys and values from outside; use method=prompt, "
            "ptuning, lora, adalora or ia3"
        )
    limit, tokens = num_positions(module), _longest_text(config, objective)
    if limit is not None and config.method.virtual_tokens + tokens > limit:
        raise ConfigError(
            f"method.virtual_tokens={config.method.virtual_tokens} before {tokens} tokens "
            f"(task.max_length{', and what is generated' if objective.writes else ''}) exceed "
            f"the {limit} positions of {label}; lower one of them"
        )


def _longest_text(config: ExperimentConfig, objective: Objective) -> int:
    """Tokens that share the positions with the virtual ones."""
    longest = config.task.max_length
    if not objective.writes:
        return longest
    problem = Problem(objective=objective, num_labels=0, image_shape=None, max_length=longest)
    new = resolve_decoding(config.generation, problem).max_new_tokens
    # A decoder goes on behind the prompt; an encoder-decoder starts anew, with one token.
    return longest + new if objective is Objective.causal else max(longest, new + 1)
