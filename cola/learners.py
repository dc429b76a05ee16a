"""The learner that a method names: the one place that knows which parts a method needs."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cola.adapters import build_adapter
from cola.attendance import UserState
from cola.autograd_learner import AutogradLearner
from cola.baselines.lora import inject_lora
from cola.baselines.methods import build_peft_method
from cola.config.choices import (
    MethodName,
    Objective,
)
from cola.config.schema import ExperimentConfig
from cola.config.user_settings import UserSettings
from cola.gradient_learner import set_training_mode
from cola.gradient_settings import resolve_settings
from cola.gradient_wiring import build_gradient_learner
from cola.interfaces import Learner
from cola.models import BaseModel
from cola.user_learning import build_users, with_plans
from cola.user_rows import UserId


def build_learner(
    config: ExperimentConfig,
    base: BaseModel,
    objective: Objective,
    *,
    adaptations: int,
    users: Sequence[UserSettings] = (),
    keep_user: Callable[[UserId, UserState], None] = lambda user, state: None,
    local_dir: Path | None = None,
) -> Learner:
    """The learner that `method` names, on a model that is on its device already.

    Args:
        config: defaults resolved.
        base: taken over.
        objective: what the loss scores.
        adaptations: of the whole run, the horizon of AdaLoRA's budget.
        users: who have adapters of their own, in the run's order; empty: nobody has.
        keep_user: takes what a user leaves with.
        local_dir: where data is exchanged with users' own processes; None: they are not trained.
    """
    if config.method.name is MethodName.cola:
        return _build_cola(config, base, objective, users, keep_user, local_dir)
    if config.method.name is MethodName.ft:
        return _build_ft(config, base, objective)
    if config.method.name is MethodName.lora:
        return _build_lora(config, base, objective)
    return _build_peft(config, base, objective, adaptations)


def _build_cola(
    config: ExperimentConfig,
    base: BaseModel,
    objective: Objective,
    users: Sequence[UserSettings],
    keep_user: Callable[[UserId, UserState], None],
    local_dir: Path | None,
) -> Learner:
    settings = resolve_settings(config, objective)
    if not users:
        adapters = {
            name: build_adapter(config.adapter, spec, seed=config.seed)
            for name, spec in base.sites.items()
        }
        return build_gradient_learner(base.module, base.sites, adapters, settings)
    learning, owned = build_users(config, base.sites, users)
    learning = with_plans(learning, config, owned, keep=keep_user, local_dir=local_dir)
    settings = dataclasses.replace(settings, users=learning)
    return build_gradient_learner(base.module, base.sites, owned, settings)


def _build_ft(config: ExperimentConfig, base: BaseModel, objective: Objective) -> Learner:
    trainable = dict(base.module.named_parameters())
    return AutogradLearner(
        base.module,
        trainable,
        **_autograd_settings(config, base, objective, trainable),
        set_training_mode=nn.Module.train,
    )


def _build_lora(config: ExperimentConfig, base: BaseModel, objective: Objective) -> Learner:
    trainable, adapters = inject_lora(
        base.module,
        base.sites,
        config.adapter,
        seed=config.seed,
        dtype=config.method.adapter_dtype,
    )
    return AutogradLearner(
        base.module,
        trainable,
        **_autograd_settings(config, base, objective, trainable),
        set_training_mode=set_training_mode,
        adapters=adapters,
    )


def _build_peft(
    config: ExperimentConfig, base: BaseModel, objective: Objective, adaptations: int
) -> Learner:
    method = build_peft_method(config, base, objective, adaptations=adaptations)
    return AutogradLearner(
        method.model,
        method.trainable,
        **_autograd_settings(config, base, objective, method.trainable),
        set_training_mode=set_training_mode,
        ranks=method.ranks,
        save=method.save,
    )


def _autograd_settings(
    config: ExperimentConfig, base: BaseModel, objective: Objective, trainable: Iterable[str]
) -> dict[str, Any]:
    heads = {name.split(".")[0] for name, spec in base.sites.items() if spec.is_head}
    return {
        "objective": objective,
        "optimizer": config.optimizer,
        "reduction": config.trainer.interval_reduction,
        # The PEFT library wraps modules and so adds parts before and after a head's own name.
        "heads": [name for name in trainable if heads.intersection(name.split("."))],
        "activation_offload": config.method.activation_offload,
    }
