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
from torch import Tensor

from cola.adapters import MLPAdapter, adapter_generator, build_adapter
from cola.batches import BatchStream
from cola.config.choices import DType, MergeMode, MethodName
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError
from cola.experiment import build_problem, build_task, check_sites
from cola.gradient_check import Subject, learned_gradients, true_gradients
from cola.gradient_settings import resolve_settings
from cola.gradient_wiring import build_gradient_learner
from cola.models import build_base_model
from cola.report.text import format_table, print_text
from cola.runtime import resolve_device
from cola.sites import SiteName
from cola.task_data import Batch
from cola.user_adapters import SiteAdapter, UserAdapters
from cola.user_learning import build_users
from cola.users import assign_users

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
    found, wanted = learned_gradients(subject), true_gradients(subject)
    checks = [
        Check(name=site, error=_relative_error(found[site], wanted[site])) for site in subject.sites
    ]
    # With several users a merged row sees all of them, an unmerged one its own.
    is_one = subject.settings.users is None
    if is_one and not any(isinstance(adapter, MLPAdapter) for adapter in subject.adapters.values()):
        unmerged, merged = (
            _logits(subject, mode) for mode in (MergeMode.unmerged, MergeMode.merged)
        )
        name = "logits, merged against unmerged (Proposition 2)"
        checks.append(Check(name=name, error=_relative_error(merged, unmerged)))
    return checks


def _build_subject(config: ExperimentConfig) -> Subject:
    exact = dataclasses.replace(config.model, dtype=DType.float64, autocast=False)
    config = dataclasses.replace(config, model=exact)
    device = resolve_device(config.device)
    problem = build_problem(config)
    base = build_base_model(config.model, problem, seed=config.seed)
    check_sites(config, base)
    task = assign_users(build_task(config, problem, base), config)
    size = min(config.trainer.batch_size, MAX_ROWS)
    stream = BatchStream(task, batch_size=size, seed=config.seed, device=device)
    _, batch = next(stream.batches(1, 1))
    settings = resolve_settings(config, problem.objective)
    adapters: Mapping[SiteName, SiteAdapter]
    if task.groups_users:
        learning, adapters = build_users(config, base.sites, task.user_settings)
        settings = dataclasses.replace(settings, users=learning)
    else:
        adapters = {
            name: build_adapter(config.adapter, spec, seed=config.seed)
            for name, spec in base.sites.items()
        }
    for name, adapter in adapters.items():
        _fill(adapter.double(), adapter_generator(config.seed, f"verify/{name}"))
    return Subject(
        model=base.module.to(device).requires_grad_(False),
        sites=base.sites,
        adapters=adapters,
        batch=_to_double(batch),
        settings=settings,
        users=config.users,
        seed=config.seed,
    )


@torch.no_grad()
def _fill(adapter: SiteAdapter, generator: torch.Generator) -> None:
    """Values away from the zero start, where everything agrees."""
    if isinstance(adapter, UserAdapters):
        for user in range(len(adapter.roster)):
            stack, place = adapter.stack_of(user)
            state = stack.member_state(place)
            for tensor in state.values():
                tensor.add_(FILL_STD * torch.randn(tensor.shape, generator=generator))
            stack.load_member(place, state)
        return
    for parameter in adapter.parameters():
        parameter.add_(FILL_STD * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def _logits(subject: Subject, mode: MergeMode) -> Tensor:
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


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    norm = wanted.norm()
    return float((found - wanted).norm() / norm) if norm > 0 else float(found.norm())
