"""Wires gradient learning from its parts: fitters, workers, fleet, taps and placements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from cola.attendance import Attendance
from cola.config.choices import (
    EvaluationMerge,
    MergeMode,
    Objective,
    OffloadTarget,
    Pristine,
    Reduction,
    Rounding,
    UserGradient,
)
from cola.config.schema import ExperimentConfig, OptimizerConfig
from cola.gradient_learner import GradientLearner
from cola.interfaces import Placement
from cola.interval_loss import BatchLoss, IntervalLoss, UserLosses
from cola.merging import Bank, Merger
from cola.offload.fitter import AdapterFitter, Fitter
from cola.offload.fleet import Fleet
from cola.offload.transfer import Transfer
from cola.offload.user_fitter import UserFitter
from cola.offload.worker import InlineWorker, ThreadWorker, Worker
from cola.sites import SiteName, SiteSpec
from cola.taps import Taps
from cola.user_adapters import SiteAdapter, UserAdapters
from cola.user_learning import UserLearning

CORES_PER_WORKER = 4
"""Cores that one fit uses: more, smaller fits at a time keep the cores busier."""


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
        users: who have adapters of their own; None: one set of adapters has no owner.
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
    users: UserLearning | None = None


def build_gradient_learner(
    base_model: nn.Module,
    sites: Mapping[SiteName, SiteSpec],
    adapters: Mapping[SiteName, SiteAdapter],
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
    fitters = [_fitter(own, settings) for own in groups]
    attendance = _attendance(fitters, settings.users)
    local = None if settings.users is None else settings.users.local
    if local is not None:
        local.start()
    trains_merged = settings.mode is MergeMode.merged
    place = partial(_placement, base_model, sites, owned, settings)
    placement = place(merged=trains_merged, copies=offloads)
    fleet = Fleet(
        fitters,
        _workers(settings.num_workers, weight.device),
        transfer=Transfer(weight.device, offload_device),
        publish=placement.publish,
        optimizer=settings.optimizer,
        overlaps=offloads,
        local=local,
    )
    taps = Taps(base_model, sites, placement=placement, sink=fleet, source=fleet)
    return GradientLearner(
        base_model,
        loss=_interval_loss(settings),
        taps=taps,
        fleet=fleet,
        placement=placement,
        other_placement=partial(place, merged=not trains_merged, copies=True),
        evaluates_elsewhere=settings.evaluates_merged not in (None, trains_merged),
        attendance=attendance,
    )


def _fitter(adapters: Mapping[SiteName, SiteAdapter], settings: GradientLearning) -> Fitter:
    if settings.users is None:
        single = {s: a for s, a in adapters.items() if not isinstance(a, UserAdapters)}
        return AdapterFitter(single, settings.optimizer, scale=settings.scale)
    of_users = {s: a for s, a in adapters.items() if isinstance(a, UserAdapters)}
    return UserFitter(
        of_users,
        settings.optimizer,
        settings.users.roster,
        shares_rows=settings.users.gradient is UserGradient.exact,
        local=settings.users.local,
    )


def _attendance(fitters: Sequence[Fitter], users: UserLearning | None) -> Attendance | None:
    if users is None:
        return None
    own = [fitter for fitter in fitters if isinstance(fitter, UserFitter)]
    return Attendance(users.roster, own, users.visits, keep=users.keep, local=users.local)


def _interval_loss(settings: GradientLearning) -> IntervalLoss:
    users = settings.users
    if users is None:
        return BatchLoss(settings.objective, settings.reduction)
    return UserLosses(
        settings.objective, settings.reduction, loss=users.loss, num_users=len(users.roster)
    )


def resolve_settings(config: ExperimentConfig, objective: Objective) -> GradientLearning:
    """The settings of gradient learning that a configuration means."""
    evaluates_merged = {
        EvaluationMerge.auto: None,
        EvaluationMerge.both: None,
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


def _num_workers(config: ExperimentConfig) -> int:
    if config.offload.name is OffloadTarget.none:
        return 0
    return config.offload.workers or max(1, torch.get_num_threads() // CORES_PER_WORKER)


def _placement(
    base_model: nn.Module,
    sites: Mapping[SiteName, SiteSpec],
    adapters: Mapping[SiteName, SiteAdapter],
    settings: GradientLearning,
    *,
    merged: bool,
    copies: bool,
) -> Placement:
    scale = settings.scale if settings.users is None else 1.0  # users have their own
    if merged:
        return Merger(
            base_model,
            sites,
            scale=scale,
            pristine=settings.pristine,
            rounding=settings.rounding,
        )
    weight = next(base_model.parameters())
    return Bank(
        adapters,
        scale=scale,
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
