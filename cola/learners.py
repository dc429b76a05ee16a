"""Wires a learner from its parts: the one place that knows which parts a method needs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cola.adapters import Adapter, build_adapter
from cola.autograd_learner import AutogradLearner
from cola.baselines.lora import inject_lora
from cola.baselines.methods import build_peft_method
from cola.config.choices import (
    EvaluationMerge,
    MergeMode,
    MethodName,
    Objective,
    OffloadTarget,
    Pristine,
    Reduction,
    Rounding,
)
from cola.config.schema import ExperimentConfig, OptimizerConfig
from cola.gradient_learner import GradientLearner, set_training_mode
from cola.interfaces import Learner, Placement
from cola.merging import Bank, Merger
from cola.models import BaseModel
from cola.offload.fitter import AdapterFitter
from cola.offload.fleet import Fleet
from cola.offload.transfer import Transfer
from cola.offload.worker import InlineWorker, ThreadWorker, Worker
from cola.sites import SiteName, SiteSpec
from cola.taps import Taps

CORES_PER_WORKER = 4
"""Cores that one fit uses: more, smaller fits at a time keep the cores busier."""


def build_learner(
    config: ExperimentConfig, base: BaseModel, objective: Objective, *, adaptations: int
) -> Learner:
    """The learner that `method` names, on a model that is on its device already.

    Args:
        config: defaults resolved.
        base: taken over.
        objective: what the loss scores.
        adaptations: of the whole run, the horizon of AdaLoRA's budget.
    """
    if config.method.name is MethodName.cola:
        return _build_cola(config, base, objective)
    if config.method.name is MethodName.ft:
        return _build_ft(config, base, objective)
    if config.method.name is MethodName.lora:
        return _build_lora(config, base, objective)
    return _build_peft(config, base, objective, adaptations)


@dataclass(frozen=True, kw_only=True)
class GradientLearning:
    """Settings of gradient learning, whatever configuration they came from.

    Attributes:
        objective: what the loss scores.
        scale: alpha.
        mode: where adapters act while training.
        optimizer, reduction: of the fits.
        num_workers: threads on the host's CPU; 0 keeps adapters on the base device.
        pristine, rounding: of merged weights.
        evaluates_merged: None evaluates as training does.
    """

    objective: Objective
    scale: float
    mode: MergeMode
    optimizer: OptimizerConfig
    reduction: Reduction
    num_workers: int
    pristine: Pristine = Pristine.host
    rounding: Rounding = Rounding.nearest
    evaluates_merged: bool | None = None


def build_gradient_learner(
    base_model: nn.Module,
    sites: Mapping[SiteName, SiteSpec],
    adapters: Mapping[SiteName, Adapter],
    settings: GradientLearning,
) -> GradientLearner:
    """Gradient learning of the given adapters on a base model, which is frozen here.

    Args:
        base_model: on its device, in its dtype.
        sites: to tap.
        adapters: initial values by site, on the CPU; moved to the offload device and taken over.
        settings: see there.
    """
    base_model.requires_grad_(False)
    weight = next(base_model.parameters())
    offloads = settings.num_workers > 0
    offload_device = torch.device("cpu") if offloads else weight.device
    # Adapters are fitted in float32 at least, whatever the base model computes in.
    master = torch.promote_types(torch.float32, weight.dtype)
    owned = {site: adapters[site].to(offload_device, master) for site in sites}
    # Fits that overlap the backward pass start site by site; others step in one go.
    groups = [{site: owned[site]} for site in owned] if offloads else [owned]
    fitters = [AdapterFitter(own, settings.optimizer, scale=settings.scale) for own in groups]
    trains_merged = settings.mode is MergeMode.merged
    placement = _placement(
        base_model, sites, owned, settings, merged=trains_merged, copies=offloads
    )
    evaluation = None
    if settings.evaluates_merged not in (None, trains_merged):
        evaluation = _placement(
            base_model, sites, owned, settings, merged=not trains_merged, copies=True
        )
    fleet = Fleet(
        fitters,
        _workers(settings.num_workers, weight.device),
        transfer=Transfer(weight.device, offload_device),
        publish=placement.publish,
        optimizer=settings.optimizer,
        overlaps=offloads,
    )
    taps = Taps(base_model, sites, placement=placement, sink=fleet, source=fleet)
    return GradientLearner(
        base_model,
        objective=settings.objective,
        taps=taps,
        fleet=fleet,
        placement=placement,
        evaluation_placement=evaluation,
        reduction=settings.reduction,
    )


def resolve_settings(config: ExperimentConfig, objective: Objective) -> GradientLearning:
    """The settings of gradient learning that a configuration means."""
    evaluates_merged = {
        EvaluationMerge.auto: None,
        EvaluationMerge.merged: True,
        EvaluationMerge.unmerged: False,
    }[config.evaluation.merge]
    return GradientLearning(
        objective=objective,
        scale=config.adapter.alpha,
        mode=config.merge.mode,
        pristine=config.merge.pristine,
        rounding=config.merge.rounding,
        optimizer=config.optimizer,
        reduction=config.trainer.interval_reduction,
        num_workers=_num_workers(config),
        evaluates_merged=evaluates_merged,
    )


def _build_cola(config: ExperimentConfig, base: BaseModel, objective: Objective) -> Learner:
    adapters = {
        name: build_adapter(config.adapter, spec, seed=config.seed)
        for name, spec in base.sites.items()
    }
    settings = resolve_settings(config, objective)
    return build_gradient_learner(base.module, base.sites, adapters, settings)


def _build_ft(config: ExperimentConfig, base: BaseModel, objective: Objective) -> Learner:
    trainable = dict(base.module.named_parameters())
    return AutogradLearner(
        base.module,
        trainable,
        **_autograd_settings(config, base, objective, trainable),
        set_training_mode=nn.Module.train,
    )


def _build_lora(config: ExperimentConfig, base: BaseModel, objective: Objective) -> Learner:
    trainable, adapters = inject_lora(base.module, base.sites, config.adapter, seed=config.seed)
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


def _num_workers(config: ExperimentConfig) -> int:
    if config.offload.name is OffloadTarget.none:
        return 0
    return config.offload.workers or max(1, torch.get_num_threads() // CORES_PER_WORKER)


def _placement(
    base_model: nn.Module,
    sites: Mapping[SiteName, SiteSpec],
    adapters: Mapping[SiteName, Adapter],
    settings: GradientLearning,
    *,
    merged: bool,
    copies: bool,
) -> Placement:
    if merged:
        return Merger(
            base_model,
            sites,
            scale=settings.scale,
            pristine=settings.pristine,
            rounding=settings.rounding,
        )
    weight = next(base_model.parameters())
    return Bank(
        adapters,
        scale=settings.scale,
        device=weight.device,
        dtype=weight.dtype,
        detached=settings.mode is MergeMode.detached,
        copies=copies,
    )


def _workers(num_workers: int, base_device: torch.device) -> list[Worker]:
    if num_workers == 0:
        return [InlineWorker(base_device)]
    cores = max(1, torch.get_num_threads() // num_workers)
    return [
        ThreadWorker(f"offload-{index}", num_threads=min(cores, CORES_PER_WORKER))
        for index in range(num_workers)
    ]
