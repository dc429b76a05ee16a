"""Users on tiny models: settings, batches, learners, and the slow loop they are compared with."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

import cola.oracle as oracle
from cola.adapters import Adapter
from cola.attendance import Visit
from cola.config.choices import (
    AdapterKind,
    MergeMode,
    Objective,
    OptimizerName,
    Reduction,
    UserGradient,
    UserLoss,
    UsersMode,
)
from cola.config.schema import OptimizerConfig
from cola.config.user_settings import UserSettings
from cola.gradient_learner import GradientLearner, set_training_mode
from cola.gradient_settings import GradientLearning
from cola.gradient_wiring import build_gradient_learner
from cola.offload.local_users import LocalUsers
from cola.optimizers import build_optimizer, optimizer_step
from cola.roster import Roster
from cola.sites import SiteName
from cola.task_data import Batch
from cola.user_adapters import UserAdapters, build_user_adapters
from cola.user_learning import UserLearning
from cola.user_rows import UserRows
from tests import tiny

Members = dict[SiteName, list[Adapter]]


def settings(*kinds: str, **changes: Any) -> list[UserSettings]:
    """One user for every `kind`, `kind:rank` or `kind:rank:optimizer`."""
    found = []
    for index, text in enumerate(kinds):
        kind, rank, optimizer = (
            *text.split(":"),
            *("lowrank", "2", "adamw")[1 + text.count(":") :],
        )
        found.append(
            UserSettings(
                name=f"user{index}",
                kind=AdapterKind[kind],
                rank=int(rank),
                hidden=(5, 7),
                alpha=0.7,
                rate=1.0,
                optimizer=OptimizerName[optimizer],
                is_local=False,
            )
        )
    return [replace(user, **changes) for user in found]


def roster(users: Sequence[UserSettings], reduction: Reduction = Reduction.mean) -> Roster:
    return Roster(users, reduction=reduction)


def filled(model: nn.Module, own: Roster, *, std: float = 0.3) -> dict[SiteName, UserAdapters]:
    """Adapters of all users away from zero, in the model's dtype."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    adapters = {}
    for site, spec in tiny.specs(model).items():
        built = build_user_adapters(spec, own, seed=0).to(dtype)
        for position in range(len(own)):
            stack, place = built.stack_of(position)
            state = stack.member_state(place)
            for tensor in state.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(dtype), alpha=std)
            stack.load_member(place, state)
        adapters[site] = built
    return adapters


def members(adapters: dict[SiteName, UserAdapters]) -> Members:
    """The same as single adapters, site by user."""
    return {
        site: [own.member(position) for position in range(len(own.roster))]
        for site, own in adapters.items()
    }


def batches(
    model: nn.Module, owners: Sequence[Sequence[int]], *, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """One batch for each list of owners (ascending), of random rows."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 5, 5) if isinstance(model, tiny.TinyConv) else (4, 6)
    stream = []
    for own in owners:
        features = torch.randn(len(own), *shape, generator=generator, dtype=torch.float64)
        stream.append(
            Batch(
                inputs={"features": features.to(dtype)},
                labels=torch.randint(0, 3, (len(own),), generator=generator),
                num_terms=len(own),
                rows=UserRows.of(own),
                row_terms=torch.ones(len(own), dtype=torch.long),
            )
        )
    return stream


def owners_of(batch: Batch) -> Tensor:
    assert batch.rows is not None
    return torch.tensor(batch.rows.users).repeat_interleave(torch.tensor(batch.rows.counts))


def learner(
    model: nn.Module,
    adapters: dict[SiteName, UserAdapters],
    *,
    mode: MergeMode = MergeMode.unmerged,
    optimizer: OptimizerConfig | None = None,
    reduction: Reduction = Reduction.mean,
    num_workers: int = 0,
    gradient: UserGradient = UserGradient.federated,
    loss: UserLoss = UserLoss.batch,
    visits: Sequence[Visit] = (),
    local: LocalUsers | None = None,
    **changes: Any,
) -> GradientLearner:
    """Gradient learning with the given adapters, which it takes over."""
    own = next(iter(adapters.values())).roster
    return build_gradient_learner(
        model,
        tiny.specs(model),
        adapters,
        GradientLearning(
            objective=Objective.classification,
            scale=1.0,
            mode=mode,
            optimizer=optimizer or tiny.optimizer(),
            reduction=reduction,
            offload=tiny.offload_plan(num_workers),
            users=UserLearning(
                roster=own, gradient=gradient, loss=loss, visits=visits, local=local
            ),
            **changes,
        ),
    )


def train_by_hand(
    model: nn.Module,
    start: Members,
    users: Sequence[UserSettings],
    stream: Sequence[Batch],
    *,
    mode: UsersMode,
    optimizer: OptimizerConfig | None = None,
    interval: int = 1,
    interval_reduction: Reduction = Reduction.mean,
    reduction: Reduction = Reduction.mean,
    gradient: UserGradient = UserGradient.federated,
    loss: UserLoss = UserLoss.batch,
    detached: bool = False,
) -> Members:
    """Plain back-propagation with masks, an optimizer per user, and loops over everything."""
    optimizer = optimizer or tiny.optimizer()
    set_training_mode(model)
    own = copy.deepcopy(start)
    current: list[Tensor] = []
    _, remove = oracle.attach_users(
        model,
        own,
        lambda: current[0],
        scales=[user.alpha for user in users],
        mode=mode,
        gradient=gradient,
        reduction=reduction,
        detached=detached,
    )
    parameters = [
        [p for site in own.values() for p in site[k].parameters()] for k in range(len(users))
    ]
    optimizers = [
        build_optimizer(p, replace(optimizer, name=user.optimizer))
        for p, user in zip(parameters, users, strict=True)
    ]
    for number, begin in enumerate(range(0, len(stream), interval), start=1):
        group = stream[begin : begin + interval]
        for batch in group:
            current[:] = [owners_of(batch)]
            logits = model(**batch.inputs).logits
            losses = functional.cross_entropy(logits, batch.labels, reduction="none")
            total = _weighted(losses, current[0], batch, group, loss, interval_reduction)
            total.backward()
        here = {int(k) for batch in group for k in owners_of(batch)}
        for k, stepped in enumerate(optimizers):
            if k in here or gradient is UserGradient.exact:
                _clip(own, k, parameters[k], optimizer)
                optimizer_step(stepped, 0.05 / number * users[k].rate)
            stepped.zero_grad()
    remove()
    return own


def _weighted(
    losses: Tensor,
    owners: Tensor,
    batch: Batch,
    group: Sequence[Batch],
    loss: UserLoss,
    interval_reduction: Reduction,
) -> Tensor:
    """A batch's part of the interval's loss."""
    if loss is UserLoss.batch:
        whole = sum(other.num_terms for other in group)
        whole = batch.num_terms if interval_reduction is Reduction.sum else whole
        return losses.sum() / whole
    total = losses.new_zeros(())
    for k in owners.unique():
        count = sum(int((owners_of(other) == k).sum()) for other in group)
        count = int((owners == k).sum()) if interval_reduction is Reduction.sum else count
        total = total + losses[owners == k].sum() / count
    return total


def _clip(own: Members, k: int, parameters: list[nn.Parameter], config: OptimizerConfig) -> None:
    assert config.clip is not None
    if config.clip.name == "global":
        clip_grad_norm_(parameters, config.clip_norm)
    if config.clip.name == "adapter":
        for site in own.values():
            clip_grad_norm_(site[k].parameters(), config.clip_norm)


def distance(found: GradientLearner, wanted: Members, start: Members) -> float:
    """Largest distance over users and sites, relative to the distance moved."""
    worst = 0.0
    for position, name in enumerate(found_names(found)):
        mine = found.export(name)
        for site in wanted:
            moved = tiny.flat(wanted[site][position]) - tiny.flat(start[site][position])
            error = tiny.flat(mine[site]).cpu() - tiny.flat(wanted[site][position])
            if moved.norm() == 0:
                assert error.norm() == 0
                continue
            worst = max(worst, (error.norm() / moved.norm()).item())
    return worst


def found_names(found: GradientLearner) -> tuple[str, ...]:
    assert found._roster is not None
    return found._roster.names
