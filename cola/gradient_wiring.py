"""Wires gradient learning from its parts: fitters, fleet, taps and placements."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cola.adaptation_data import AdaptationData
from cola.adapters import Adapter, install_parameters, skeleton
from cola.attendance import Attendance
from cola.bank import Bank
from cola.block_graphs import BlockGraphs
from cola.config.choices import MergeMode, Payload, UserGradient
from cola.gradient_learner import GradientLearner
from cola.gradient_learning import adapter_gradients
from cola.gradient_settings import GradientLearning
from cola.interfaces import Placement
from cola.interval_loss import BatchLoss, IntervalLoss, UserLosses
from cola.merging import Merger
from cola.offload.buffers import Buffers
from cola.offload.deliveries import Former
from cola.offload.fit import Fitter
from cola.offload.fitter import AdapterFitter
from cola.offload.fleet import Fleet
from cola.offload.payload import choose_payloads, may_form
from cola.offload.placing import Group
from cola.offload.product_replays import ProductReplays
from cola.offload.slot import Berth
from cola.offload.user_fitter import UserFitter
from cola.row_dropping import RowDropping
from cola.sites import SiteName, SiteSpec
from cola.taps import Taps
from cola.user_adapters import SiteAdapter, UserAdapters
from cola.user_learning import UserLearning


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
    plan = settings.offload
    # Adapters are fitted in float32 at least, whatever the base model computes in.
    master = torch.promote_types(torch.float32, weight.dtype)
    placed = plan.place({site: adapters[site] for site in sites}, weight.device, master)
    owned = {site: adapter for group in placed for site, adapter in group.adapters.items()}
    owned = {site: owned[site] for site in sites}
    buffers, replays = Buffers(), _replays(placed, settings)
    berths = [
        Berth(
            fitter=_fitter(group.adapters, settings, buffers, replays.get(id(group.worker))),
            worker=group.worker,
            backlog=group.backlog,
            transfer=group.transfer,
            blocks=group.blocks,
            gathers=group.gathers,
            is_first=next(iter(sites)) in group.adapters,
        )
        for group in placed
    ]
    attendance = _attendance([berth.fitter for berth in berths], settings.users)
    local = None if settings.users is None else settings.users.local
    if local is not None:
        local.start()
    trains_merged = settings.mode is MergeMode.merged
    place = partial(_placement, base_model, sites, owned, settings)
    placement = place(merged=trains_merged, copies=plan.overlaps)
    fleet = Fleet(
        berths,
        publish=placement.publish_all,
        optimizer=settings.optimizer,
        overlaps=plan.overlaps,
        staleness=plan.staleness,
        payloads=_payloads(owned, settings, weight),
        formers=_formers(berths, placement, settings, weight),
        local=local,
        buffers=buffers,
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
        row_dropping=RowDropping(sites, weight.device, enabled=plan.drops_padding),
        graphs=None
        if settings.capturers is None
        else BlockGraphs(base_model, taps, settings.capturers(weight.device)),
        staleness=plan.staleness,
        attendance=attendance,
    )


def _replays(placed: Sequence[Group], settings: GradientLearning) -> dict[int, ProductReplays]:
    """Captured products of each worker on another GPU, by the worker's identity."""
    if settings.capturers is None or settings.users is not None:
        return {}
    on_gpus = {id(g.worker): g.transfer.target for g in placed if g.transfer.ends_on_gpu}
    return {
        worker: ProductReplays(settings.capturers(device)) for worker, device in on_gpus.items()
    }


def _fitter(
    adapters: Mapping[SiteName, SiteAdapter],
    settings: GradientLearning,
    buffers: Buffers,
    replays: ProductReplays | None,
) -> Fitter:
    if settings.users is None:
        single = {s: a for s, a in adapters.items() if not isinstance(a, UserAdapters)}
        return AdapterFitter(
            single, settings.optimizer, scale=settings.scale, buffers=buffers, replays=replays
        )
    of_users = {s: a for s, a in adapters.items() if isinstance(a, UserAdapters)}
    return UserFitter(
        of_users,
        settings.optimizer,
        settings.users.roster,
        shares_rows=settings.users.gradient is UserGradient.exact,
        local=settings.users.local,
    )


def _payloads(
    adapters: Mapping[SiteName, SiteAdapter], settings: GradientLearning, weight: Tensor
) -> dict[SiteName, Payload]:
    plan = settings.offload
    if settings.users is not None or not plan.overlaps:
        return dict.fromkeys(adapters, Payload.factors)
    single = {s: a for s, a in adapters.items() if not isinstance(a, UserAdapters)}
    merged = settings.mode is MergeMode.merged
    return choose_payloads(
        single,
        payload=plan.payload,
        base=weight.device,
        dtype=weight.dtype,
        wire=plan.wire_dtype,
        num_rows=plan.num_rows,
        eligible=may_form(merged, plan.base_gradients),
    )


def _formers(
    berths: Sequence[Berth], placement: Placement, settings: GradientLearning, like: Tensor
) -> dict[SiteName, Former]:
    """Of every site whose adapter has no owner; which of them are used is the payloads' to say."""
    formers = {}
    for berth in berths:
        fitter = berth.fitter
        if not isinstance(fitter, AdapterFitter):
            continue
        for site, fitted in fitter.adapters.items():
            # Beside its site an adapter has its parameters; a merged one must not need them.
            here = (
                placement.adapter(site) if isinstance(placement, Bank) else _outline(fitted, like)
            )
            assert not isinstance(here, UserAdapters)
            form = partial(_form, here, settings.scale, next(fitted.parameters()).dtype)
            formers[site] = Former(form, partial(fitter.add_gradients, site))
    return formers


def _form(
    adapter: Adapter, scale: float, dtype: torch.dtype, data: AdaptationData
) -> dict[str, Tensor]:
    """A gradient in the type that it is summed in.

    What fits a host can do is bound by its memory: it should neither convert a gradient nor copy it
    from where it lands, and the wire has more time than that.
    """
    found = adapter_gradients(adapter, data, scale)
    return {name: gradient.to(dtype) for name, gradient in found.items()}


def _outline(adapter: Adapter, like: Tensor) -> Adapter:
    """An adapter of the same shape whose parameters, zeros, take no memory."""
    zero = torch.zeros((), device=like.device, dtype=like.dtype)
    outline = skeleton(adapter)
    install_parameters(outline, {n: zero.expand(p.shape) for n, p in adapter.named_parameters()})
    return outline


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
            homes=_homes(adapters) if settings.offload.overlaps else None,
        )
    weight = next(base_model.parameters())
    return Bank(
        adapters,
        scale=scale,
        device=weight.device,
        dtype=weight.dtype,
        detached=settings.mode is MergeMode.detached,
        copies=copies,
        stays_in_place=settings.capturers is not None,
    )


def _homes(adapters: Mapping[SiteName, SiteAdapter]) -> dict[SiteName, torch.device]:
    """Where adapters are fitted."""
    return {site: next(adapter.parameters()).device for site, adapter in adapters.items()}
