"""`cola-verify`: is gradient learning exact on this very model, task and setting?

Every site's adapter gradient is computed twice on one real batch, through taps and fleet and by
plain back-propagation through the same model (`cola.oracle`). Both in float64, with adapters at
seeded non-zero values: at the zero start everything agrees.
"""

import copy
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cola.adapters import Adapter, MLPAdapter, adapter_generator, build_adapter
from cola.batches import BatchStream
from cola.config.choices import DType, MergeMode, MethodName
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError
from cola.experiment import build_problem, build_task, check_sites
from cola.interfaces import Batch
from cola.learners import GradientLearning, build_gradient_learner, resolve_settings
from cola.models import build_base_model
from cola.objectives import task_loss
from cola.oracle import attach_trainable
from cola.report.text import format_table, print_text
from cola.runtime import resolve_device, seed_everything
from cola.sites import SiteName, SiteSpec

logger = logging.getLogger(__name__)

TOLERANCE = 1e-10
"""Relative error in float64: two exact routes differ by rounding only."""

FILL_STD = 0.02
"""Spread of the values added to the adapters' initial ones."""

MAX_ROWS = 8
"""Rows of the batch; more rows would show nothing new."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the verdict."""

    name: str
    error: float

    @property
    def holds(self) -> bool:
        """Whether the error is rounding; what is not a number never is."""
        return self.error <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is verified: a model, its filled adapters, a batch."""

    model: nn.Module
    sites: Mapping[SiteName, SiteSpec]
    adapters: Mapping[SiteName, Adapter]
    batch: Batch
    settings: GradientLearning
    seed: int


def verify(config: ExperimentConfig) -> bool:
    """Checks the composed model and prints the table; True if everything is exact.

    Raises:
        ConfigError: the method has nothing to verify.
    """
    if config.method.name is not MethodName.cola:
        raise ConfigError(
            f"method={config.method.name.name} is plain back-propagation already; cola-verify "
            "checks method=cola"
        )
    checks = run_checks(config)
    rows = [[c.name, f"{c.error:.1e}", "exact" if c.holds else "DIFFERS"] for c in checks]
    print_text(format_table(["site", "relative error", "verdict"], rows))
    failed = [check.name for check in checks if not check.holds]
    if failed:
        logger.error("%d of %d checks differ from autograd", len(failed), len(checks))
    return not failed


def run_checks(config: ExperimentConfig) -> list[Check]:
    """One check per site's gradient, and one per logit tensor for Proposition 2."""
    subject = _build_subject(config)
    found, wanted = _learned_gradients(subject), _true_gradients(subject)
    checks = [
        Check(name=site, error=_relative_error(found[site], wanted[site])) for site in subject.sites
    ]
    if not any(isinstance(adapter, MLPAdapter) for adapter in subject.adapters.values()):
        unmerged, merged = (
            _logits(subject, mode) for mode in (MergeMode.unmerged, MergeMode.merged)
        )
        name = "logits, merged against unmerged (Proposition 2)"
        checks.append(Check(name=name, error=_relative_error(merged, unmerged)))
    return checks


def _build_subject(config: ExperimentConfig) -> _Subject:
    exact = dataclasses.replace(config.model, dtype=DType.float64, autocast=False)
    config = dataclasses.replace(config, model=exact)
    device = resolve_device(config.device)
    problem = build_problem(config)
    base = build_base_model(config.model, problem, seed=config.seed)
    check_sites(config, base)
    task = build_task(config, problem, base)
    size = min(config.trainer.batch_size, MAX_ROWS)
    stream = BatchStream(task, batch_size=size, seed=config.seed, device=device)
    _, batch = next(stream.batches(1, 1))
    adapters = {}
    for name, spec in base.sites.items():
        adapter = build_adapter(config.adapter, spec, seed=config.seed).double()
        generator = adapter_generator(config.seed, f"verify/{name}")
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(FILL_STD * torch.randn(parameter.shape, generator=generator))
        adapters[name] = adapter
    return _Subject(
        model=base.module.to(device).requires_grad_(False),
        sites=base.sites,
        adapters=adapters,
        batch=_to_double(batch),
        settings=resolve_settings(config, problem.objective),
        seed=config.seed,
    )


def _learned_gradients(subject: _Subject) -> dict[SiteName, Tensor]:
    """By Algorithm 1, as a run does it."""
    learner = build_gradient_learner(
        subject.model, subject.sites, copy.deepcopy(dict(subject.adapters)), subject.settings
    )
    try:
        seed_everything(subject.seed)  # both routes see the same dropout
        learner.record(subject.batch, None)
        return {site: _flat_gradient(adapter) for site, adapter in learner.export().items()}
    finally:
        learner.close()


def _true_gradients(subject: _Subject) -> dict[SiteName, Tensor]:
    """By back-propagation through the model and its adapters."""
    device = next(subject.model.parameters()).device
    adapters = {s: copy.deepcopy(a).to(device) for s, a in subject.adapters.items()}
    _, remove = attach_trainable(subject.model, adapters, scale=subject.settings.scale)
    seed_everything(subject.seed)
    logits = subject.model(**subject.batch.inputs).logits
    loss = task_loss(subject.settings.objective, logits, subject.batch)
    loss.backward()  # type: ignore[no-untyped-call]
    remove()
    return {site: _flat_gradient(adapter) for site, adapter in adapters.items()}


@torch.no_grad()
def _logits(subject: _Subject, mode: MergeMode) -> Tensor:
    settings = dataclasses.replace(subject.settings, mode=mode, evaluates_merged=None)
    learner = build_gradient_learner(
        subject.model, subject.sites, copy.deepcopy(dict(subject.adapters)), settings
    )
    try:
        with learner.evaluating() as model:
            logits: Tensor = model(**subject.batch.inputs).logits
            return logits.clone()
    finally:
        learner.close()


def _to_double(batch: Batch) -> Batch:
    inputs = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in batch.inputs.items()
    }
    return dataclasses.replace(batch, inputs=inputs)


def _flat_gradient(adapter: Adapter) -> Tensor:
    gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in adapter.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients]).cpu()


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    norm = wanted.norm()
    return float((found - wanted).norm() / norm) if norm > 0 else float(found.norm())
