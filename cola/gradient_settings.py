"""Settings of gradient learning, and what a configuration means by them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cola.block_memory import Capturer
from cola.config.choices import EvaluationMerge, MergeMode, Objective, Pristine, Reduction, Rounding
from cola.config.schema import ExperimentConfig, OptimizerConfig
from cola.cuda_capture import CudaCapturer
from cola.errors import ConfigError
from cola.offload.placing import OffloadPlan, resolve_offload
from cola.runtime import resolve_device
from cola.user_learning import UserLearning


@dataclass(frozen=True, kw_only=True)
class GradientLearning:
    """Settings of gradient learning, whatever configuration they came from.

    Attributes:
        objective: what the loss scores.
        scale: alpha.
        mode: where adapters act while training.
        optimizer, reduction: of the fits.
        offload: where adapters are fitted, and how data gets there.
        pristine, rounding: of merged weights.
        evaluates_merged: None evaluates as training does.
        users: who have adapters of their own; None: one set of adapters has no owner.
        capturers: of a device: makes graphs of the base model's blocks, and of products of fits on
            another GPU, which are then replayed; None: none are.
    """

    objective: Objective
    scale: float
    mode: MergeMode
    optimizer: OptimizerConfig
    reduction: Reduction
    offload: OffloadPlan
    pristine: Pristine = Pristine.host
    rounding: Rounding = Rounding.nearest
    evaluates_merged: bool | None = None
    users: UserLearning | None = None
    capturers: Callable[[torch.device], Capturer] | None = None


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
        offload=resolve_offload(
            config.offload,
            resolve_device(config.device),
            num_rows=config.trainer.batch_size * config.task.max_length,
        ),
        evaluates_merged=evaluates_merged,
        capturers=_capturers(config),
    )


def _capturers(config: ExperimentConfig) -> Callable[[torch.device], Capturer] | None:
    if not config.model.cuda_graphs:
        return None
    device = resolve_device(config.device)
    if device.type != "cuda":
        raise ConfigError(
            f"model.cuda_graphs=true with device={device}: graphs are captured on a GPU; use "
            "device=cuda:0, or leave it out"
        )
    return CudaCapturer
