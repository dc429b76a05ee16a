"""Optimizers of adapters and baselines, and a schedule that counts adaptations, not batches."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cola.config.choices import OptimizerName, ScheduleName
from cola.config.schema import OptimizerConfig, ScheduleConfig

ADAMW_BETAS = (0.9, 0.999)
"""Decay of both moments. Paper: Table 5."""

ADAMW_EPS = 1e-8
"""Keeps AdamW's denominator from zero. Paper: Table 5."""


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    *,
    heads: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """One optimizer over the given parameters; the learning rate is set before every step.

    Both learners build theirs here, so that a comparison of methods compares nothing else.

    Args:
        parameters: all of them.
        config: its `lr` is resolved.
        heads: those of new heads, which `config.head_lr` is for.
    """
    groups = _groups(list(parameters), config, {id(parameter) for parameter in heads})
    if config.name is OptimizerName.sgd:
        return torch.optim.SGD(
            groups,
            lr=0.0,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=ADAMW_BETAS,
        eps=ADAMW_EPS,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _groups(
    parameters: list[nn.Parameter], config: OptimizerConfig, heads: set[int]
) -> list[dict[str, Any]]:
    head_factor = rate_factor(config, is_head=True)
    if head_factor == 1.0 or not heads:
        return [{"params": parameters, "rate_factor": 1.0}]
    groups = [
        {"params": [p for p in parameters if id(p) not in heads], "rate_factor": 1.0},
        {
            "params": [p for p in parameters if id(p) in heads],
            "rate_factor": head_factor,
        },
    ]
    return [group for group in groups if group["params"]]


def rate_factor(config: OptimizerConfig, *, is_head: bool) -> float:
    """Factor on the learning rate: new heads may have one of their own."""
    if not is_head or config.head_lr is None or config.lr is None:
        return 1.0
    return config.head_lr / config.lr


def optimizer_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One step at a given rate, that of new heads in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_factor"]
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
