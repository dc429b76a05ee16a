"""Configured base models and text batches that several test files share."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from cola.adapters import Adapter
from cola.block_memory import Capturer
from cola.config.choices import AdapterKind, MergeMode, Objective, Reduction
from cola.config.schema import ModelConfig
from cola.gradient_learner import GradientLearner
from cola.gradient_settings import GradientLearning
from cola.gradient_wiring import build_gradient_learner
from cola.models import BaseModel
from cola.objectives import IGNORED
from cola.sites import SiteName
from cola.task_data import Batch, Problem
from tests import tiny

MODELS = Path(__file__).parents[1] / "conf" / "model"

OBJECTIVES = {"tiny-bart": "seq2seq", "tiny-llama": "causal", "tiny-gpt2": "causal"}


def model_of(name: str, **settings: Any) -> ModelConfig:
    """A model of conf/model, checked against the schema."""
    values = OmegaConf.load(MODELS / f"{name}.yaml")
    built = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    assert isinstance(built, ModelConfig)
    return replace(built, **settings)


def text_problem(objective: str = "classification", *, num_labels: int = 2) -> Problem:
    return Problem(
        objective=Objective[objective], num_labels=num_labels, image_shape=None, max_length=128
    )


def image_problem(*shape: int) -> Problem:
    channels, height, width = shape
    return Problem(
        objective=Objective.image,
        num_labels=10,
        image_shape=(channels, height, width),
        max_length=0,
    )


def filled(base: BaseModel, kind: AdapterKind) -> dict[SiteName, Adapter]:
    """Adapters away from zero at every site, in the base model's dtype or float32."""
    dtype = torch.promote_types(torch.float32, next(base.module.parameters()).dtype)
    sites = base.sites.items()
    return {site: tiny.filled_adapter(kind, spec).to(dtype) for site, spec in sites}


def learner_of(
    base: BaseModel,
    objective: str,
    adapters: dict[SiteName, Adapter],
    mode: MergeMode = MergeMode.unmerged,
    *,
    num_workers: int = 0,
    capturer: Capturer | None = None,
) -> GradientLearner:
    """Gradient learning on a base model, with copies of the adapters."""
    settings = GradientLearning(
        objective=Objective[objective],
        scale=tiny.SCALE,
        mode=mode,
        optimizer=tiny.optimizer(),
        reduction=Reduction.mean,
        offload=tiny.offload_plan(num_workers),
        capturers=None if capturer is None else lambda device: capturer,
    )
    return build_gradient_learner(base.module, base.sites, copy.deepcopy(adapters), settings)


def token_batches(objective: str, num: int) -> list[Batch]:
    """Padded batches of different sizes; words of the built-in vocabulary at random."""
    generator = torch.Generator().manual_seed(2)
    builders = {"seq2seq": _seq2seq_batch, "causal": _causal_batch}
    build = builders.get(objective, _classification_batch)
    return [build(2 + index % 2, generator) for index in range(num)]


def _words(size: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(4, 50, (size, length), generator=generator)


def _classification_batch(size: int, generator: torch.Generator) -> Batch:
    """Right padding."""
    inputs = _words(size, 7, generator)
    mask = torch.ones_like(inputs)
    mask[0, 5:] = 0
    inputs[0, 5:] = 0
    return Batch(
        inputs={"input_ids": inputs, "attention_mask": mask},
        labels=torch.arange(size) % 2,
        num_terms=size,
    )


def _seq2seq_batch(size: int, generator: torch.Generator) -> Batch:
    """Right padding on both sides; the decoder starts from `</s>`."""
    inputs, labels = _words(size, 7, generator), _words(size, 4, generator)
    mask = torch.ones_like(inputs)
    mask[0, 5:] = 0
    inputs[0, 5:] = 0
    decoder = torch.cat([torch.full((size, 1), 3), labels[:, :-1]], dim=1)
    labels[0, 3:] = IGNORED
    return Batch(
        inputs={"input_ids": inputs, "attention_mask": mask, "decoder_input_ids": decoder},
        labels=labels,
        num_terms=int((labels != IGNORED).sum()),
    )


def _causal_batch(size: int, generator: torch.Generator) -> Batch:
    """Left padding with positions from the mask; the first half is a prompt."""
    inputs = _words(size, 7, generator)
    mask = torch.ones_like(inputs)
    mask[0, :2] = 0
    inputs[0, :2] = 0
    labels = inputs.clone()
    labels[:, :4] = IGNORED
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(
        inputs={"input_ids": inputs, "attention_mask": mask, "position_ids": positions},
        labels=labels,
        num_terms=int((labels[:, 1:] != IGNORED).sum()),
    )
