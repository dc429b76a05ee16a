"""Gradients of every adapter on one batch, computed twice: as a run does it, and plainly.

The two routes meet in nothing but the base model and the adapters' values: taps, fleet, routing and
closed forms on one side, hooks inside the autograd graph (`cola.oracle`) on the other.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cola.adapters import Adapter
from cola.config.choices import UserLoss
from cola.config.schema import UsersConfig
from cola.gradient_settings import GradientLearning
from cola.gradient_wiring import build_gradient_learner
from cola.objectives import row_losses, task_loss
from cola.oracle import attach_trainable, attach_users
from cola.runtime import seed_everything
from cola.sites import SiteName, SiteSpec
from cola.task_data import Batch
from cola.user_adapters import SiteAdapter, UserAdapters
from cola.user_stack import UserStack


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is verified: a model, its filled adapters, a batch."""

    model: nn.Module
    sites: Mapping[SiteName, SiteSpec]
    adapters: Mapping[SiteName, SiteAdapter]
    batch: Batch
    settings: GradientLearning
    users: UsersConfig
    seed: int


def learned_gradients(subject: Subject) -> dict[SiteName, Tensor]:
    """By Algorithm 1, as a run does it: all gradients of a site, user by user, on the CPU."""
    adapters = copy.deepcopy(dict(subject.adapters))
    learner = build_gradient_learner(subject.model, subject.sites, adapters, subject.settings)
    try:
        seed_everything(subject.seed)  # both routes see the same dropout
        learner.record(subject.batch, None)
        state = learner.state_dict()["fleet"]["sites"]
        return {site: _accumulated(adapter, state[site]) for site, adapter in adapters.items()}
    finally:
        learner.close()


def true_gradients(subject: Subject) -> dict[SiteName, Tensor]:
    """By back-propagation through the model and its adapters; order as in `learned_gradients`."""
    device = next(subject.model.parameters()).device
    adapters = {
        site: [copy.deepcopy(one).to(device).requires_grad_(True) for one in _members(adapter)]
        for site, adapter in subject.adapters.items()
    }
    remove = _attach(subject, adapters)
    seed_everything(subject.seed)
    logits = subject.model(**subject.batch.inputs).logits
    _loss(subject, logits).backward()  # type: ignore[no-untyped-call]
    remove()
    return {
        site: _flat(
            p.new_zeros(p.shape) if p.grad is None else p.grad
            for one in own
            for p in one.parameters()
        )
        for site, own in adapters.items()
    }


def _attach(subject: Subject, adapters: Mapping[SiteName, list[Adapter]]) -> Any:
    learning = subject.settings.users
    if learning is None:
        single = {site: own[0] for site, own in adapters.items()}
        return attach_trainable(subject.model, single, scale=subject.settings.scale)[1]
    users = subject.users
    return attach_users(
        subject.model,
        adapters,
        lambda: _owners(subject.batch),
        scales=[user.alpha for user in learning.roster.settings],
        mode=users.name,
        gradient=users.gradient,
        reduction=users.reduce,
    )[1]


def _loss(subject: Subject, logits: Tensor) -> Tensor:
    """Of the batch, or the sum of every user's own."""
    objective, batch = subject.settings.objective, subject.batch
    if subject.settings.users is None or subject.users.loss is UserLoss.batch:
        return task_loss(objective, logits, batch)
    assert batch.rows is not None
    assert batch.row_terms is not None
    losses, owners = row_losses(objective, logits, batch), _owners(batch)
    terms = batch.row_terms.to(losses.device)
    own = [losses[owners == k].sum() / terms[owners == k].sum() for k in batch.rows.users]
    return torch.stack(own).sum()


def _owners(batch: Batch) -> Tensor:
    """Position of each row's user, (B,)."""
    assert batch.rows is not None
    counts = torch.tensor(batch.rows.counts)
    return torch.tensor(batch.rows.users).repeat_interleave(counts).to(batch.labels.device)


def _members(adapter: SiteAdapter) -> list[Adapter]:
    if isinstance(adapter, UserAdapters):
        return [adapter.member(user) for user in range(len(adapter.roster))]
    return [adapter]


def _accumulated(adapter: SiteAdapter, state: Mapping[str, Any]) -> Tensor:
    """What a fitter's state holds of one site; zero for users without rows."""
    if not isinstance(adapter, UserAdapters):
        return _flat(state["gradient"][name] for name, _ in adapter.named_parameters())
    return _flat(
        gradient
        for stack, part in zip(adapter.stacks, state["cohorts"], strict=True)
        for user in range(stack.num_users)
        for gradient in stack.own_parts(user, part["gradients"] or _nothing(stack)).values()
    )


def _nothing(stack: UserStack) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in stack.parameter_stacks().items()}


def _flat(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().cpu() for gradient in gradients])
