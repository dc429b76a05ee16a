"""Base models: loads or builds them and finds their sites (text and image).

`resolve_family` tells what a model is for, `build_base_model` builds it. transformers and peft are
imported only by text models, inside functions: an image run never pays for them.
"""

from collections.abc import Callable

import torch

from cola.config.choices import ModelSource
from cola.config.schema import ModelConfig
from cola.models.architecture import resolve_family
from cola.models.base import CPU, BaseModel, autocast_forward
from cola.models.image import build_image
from cola.models.site_checks import check_rank, shared_parameter_sites
from cola.models.site_selection import resolve_sites
from cola.models.text import build_pretrained, build_random
from cola.task_data import Problem

__all__ = [
    "BaseModel",
    "build_base_model",
    "check_rank",
    "resolve_family",
    "resolve_sites",
    "shared_parameter_sites",
]

_BUILDERS: dict[ModelSource, Callable[..., BaseModel]] = {
    ModelSource.pretrained: build_pretrained,
    ModelSource.random: build_random,
    ModelSource.image: build_image,
}


def build_base_model(
    model: ModelConfig,
    problem: Problem,
    *,
    seed: int,
    on_meta: bool = False,
    device: torch.device = CPU,
) -> BaseModel:
    """Builds the base model of a run.

    Args:
        model: which model, its dtype and its sites.
        problem: what it is built for (classes, image shape, tokens).
        seed: decides every weight that no pretrained file holds; global generators stay untouched.
        on_meta: shapes only, for dry runs: no weights, network or tokenizer.
        device: where it is built. Runs build on the CPU, where the seed gives the same weights on
            every machine; drawing billions of weights there takes minutes, on a GPU a second.

    Raises:
        ConfigError: the model does not fit the problem, or its files are missing.
        SiteError: `model.sites` names no module, or one that cannot be tapped.
    """
    base = _BUILDERS[model.source](model, problem, seed=seed, on_meta=on_meta, device=device)
    if model.autocast and not on_meta:  # torch has no autocast for the meta device
        autocast_forward(base.module)
    return base
