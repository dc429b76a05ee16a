"""Checks of `method` against what else is configured: settings that a method does not have.

Part of `validate`; no Hydra and no torch.
"""

from collections.abc import Collection

from cola.config.choices import (
    AdapterKind,
    ClipMode,
    EvaluationMerge,
    MergeMode,
    MethodName,
    ModelSource,
    OffloadTarget,
)
from cola.config.keys import choice_key, flatten, word
from cola.config.schema import ExperimentConfig
from cola.config.user_checks import SEVERAL_USERS
from cola.errors import ConfigError

_ADALORA = {MethodName.adalora}
_VIRTUAL_TOKENS = {MethodName.prompt, MethodName.prefix, MethodName.ptuning}

METHOD_KEYS = {
    "sites": {MethodName.adalora, MethodName.ia3},
    "activation_offload": set(MethodName) - {MethodName.cola},
    "adapter_dtype": {MethodName.lora},
    "init_rank": _ADALORA,
    "target_rank": _ADALORA,
    "beta": _ADALORA,
    "delta_t": _ADALORA,
    "init_ratio": _ADALORA,
    "final_ratio": _ADALORA,
    "orth_weight": _ADALORA,
    "virtual_tokens": _VIRTUAL_TOKENS,
    "init_text": {MethodName.prompt},
    "encoder_hidden": {MethodName.ptuning},
}
"""Keys of `method` and the methods that read them."""


def check_method(config: ExperimentConfig, given: Collection[str]) -> None:
    """Refuses settings that the method does not have, and those that do not fit together.

    Args:
        config: of the right types and ranges.
        given: groups and keys set explicitly; a file's value that cannot apply is simply not used.

    Raises:
        ConfigError: what was given, what is allowed, what to change.
    """
    _check_own_keys(config, given)
    if config.method.name is not MethodName.cola:
        _check_other_groups(config, given)
        _check_baseline(config)


def _check_own_keys(config: ExperimentConfig, given: Collection[str]) -> None:
    method, values = config.method, flatten(config)
    for key, methods in METHOD_KEYS.items():
        name = f"method.{key}"
        if name in given and method.name not in methods:
            takers = ", ".join(sorted(one.name for one in methods))
            raise ConfigError(
                f"{name}={word(values[name])} has no effect with method={method.name.name}; it is "
                f"a setting of {takers}: leave it out or choose one of those"
            )
    if method.activation_offload and method.name is MethodName.cola:
        raise ConfigError(
            "method.activation_offload=true has no effect with method=cola, which keeps no "
            "tensors of adapters for the backward pass; leave it out"
        )
    if method.name is not MethodName.adalora:
        return
    if method.target_rank >= method.init_rank:
        raise ConfigError(
            f"method.target_rank={method.target_rank} with method.init_rank={method.init_rank}: "
            "AdaLoRA takes ranks away; give a target below the initial rank"
        )
    if method.init_ratio + method.final_ratio >= 1:
        raise ConfigError(
            f"method.init_ratio={method.init_ratio} and method.final_ratio={method.final_ratio} "
            "leave no part of the run to take ranks away in; their sum must be below 1"
        )


def _check_other_groups(config: ExperimentConfig, given: Collection[str]) -> None:
    """Refuses explicit values of groups that a baseline does not have."""
    method, users = config.method.name, config.users.name
    if users.owns_adapters:
        raise ConfigError(
            f"users={users.name} with method={method.name}: only method=cola gives every user "
            "adapters of their own; use users=one or joint, or method=cola"
        )
    allowed, values = _neutral_settings(config), flatten(config)
    takes = "adapter.rank and adapter.alpha alone" if method is MethodName.lora else "none"
    for name in sorted(given):
        if name.split(".")[0] in ("adapter", "merge", "users", "offload") and name not in allowed:
            value = word(values.get(name, values.get(choice_key(name))))
            raise ConfigError(
                f"{name}={value} does not apply to method={method.name}, which takes {takes} of "
                "the groups adapter, merge, users and offload; leave it out or use method=cola"
            )
    if config.evaluation.merge is not EvaluationMerge.auto:
        raise ConfigError(
            f"evaluation.merge={config.evaluation.merge.name} with method={method.name}: only "
            "adapters of method=cola can be merged for evaluation; leave it out"
        )
    if config.optimizer.clip is ClipMode["adapter"]:
        raise ConfigError(
            f"optimizer.clip=adapter with method={method.name}: only method=cola clips each "
            "adapter by itself; use optimizer.clip=global or none"
        )


def _neutral_settings(config: ExperimentConfig) -> set[str]:
    """Explicit settings that a baseline may carry, because they say what it does anyway."""
    # Whose rows are scored apart is nothing that a method could not do.
    neutral = {"users", "users.name", *(f"users.{key}" for key in SEVERAL_USERS)}
    if config.method.name is MethodName.lora:
        neutral |= {"adapter.rank", "adapter.alpha"}
        if config.adapter.kind is AdapterKind.lowrank:
            neutral |= {"adapter", "adapter.kind"}
    if config.merge.mode is MergeMode.unmerged:
        neutral |= {"merge", "merge.mode"}
    if config.offload.name is OffloadTarget.none:
        neutral |= {"offload", "offload.name"}
    return neutral


def _check_baseline(config: ExperimentConfig) -> None:
    """Refuses models that a baseline cannot train."""
    method, model = config.method.name, config.model
    if model.source is ModelSource.image and method not in (MethodName.ft, MethodName.lora):
        raise ConfigError(
            f"method={method.name} with model={model.name}: the PEFT library has it for text "
            "models alone; use method=cola, ft or lora, or a text task such as task=synthetic"
        )
    if method is MethodName.prefix and model.gradient_checkpointing:
        raise ConfigError(
            "method=prefix with model.gradient_checkpointing=true: the prefix stands in the cache "
            "of keys and values, which checkpointing switches off; leave it out"
        )
