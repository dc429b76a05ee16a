"""Optimizers of adapters and baselines, and a schedule that counts adaptations, not batches."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from cola.config.choices import OptimizerName, ScheduleName
from cola.config.schema import OptimizerConfig, ScheduleConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """One optimizer over the given parameters; the learning rate is set before every step.

    Both learners build theirs here, so that a comparison of methods compares nothing else.
    """
    parameters = list(parameters)
    if config.name is OptimizerName.sgd:
        return torch.optim.SGD(
            parameters,
            lr=0.0,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,
    )


def optimizer_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One step at a given rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


class LearningRateSchedule:
    """Learning rate of each adaptation. The horizon is the number of adaptations, ceil(T / I).

    Warm-up rises linearly over the first `warmup_ratio` of the horizon and reaches the full rate
    right after it; no adaptation has rate zero.
    """

    def __init__(self, config: ScheduleConfig, *, peak: float, horizon: int) -> None:
        self._name = config.name
        self.peak = peak
        self._horizon = horizon
        self._warmup = math.ceil(config.warmup_ratio * horizon)

    def rate(self, adaptation: int) -> float:
        """Rate of the adaptation with this index, 0 <= index < horizon."""
        if adaptation < self._warmup:
            return self.peak * (adaptation + 1) / (self._warmup + 1)
        progress = (adaptation - self._warmup) / max(1, self._horizon - self._warmup)
        factors = {
            ScheduleName.constant: 1.0,
            ScheduleName.linear: 1.0 - progress,
            ScheduleName.cosine: 0.5 * (1.0 + math.cos(math.pi * progress)),
        }
        return self.peak * factors[self._name]
