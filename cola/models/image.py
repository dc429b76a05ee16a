"""Small image models with seeded random weights: linear, mlp and cnn.

Paper: section 4.4, learning from scratch = a frozen random base with adapters on every layer.
`model.architecture` names the type and its widths.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cola.config.choices import Objective
from cola.config.schema import ModelConfig
from cola.errors import ConfigError
from cola.models.base import BaseModel, cast_parameters, seeded_weights, stored_names
from cola.models.site_selection import resolve_sites
from cola.task_data import Problem


class ImageOutput(NamedTuple):
    """Answer of an image model.

    Attributes:
        logits: (B, num_labels).
    """

    logits: Tensor


class ImageModel(nn.Module):
    """Layers from pixels to logits."""

    def __init__(self, layers: OrderedDict[str, nn.Module]) -> None:
        """Adds the layers under their names, to run in this order."""
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, pixels: Tensor) -> ImageOutput:
        """Scores images of shape (B, channels, height, width)."""
        hidden = pixels
        for layer in self.children():
            hidden = layer(hidden)
        return ImageOutput(logits=hidden)


def build_image(
    model: ModelConfig, problem: Problem, *, seed: int, on_meta: bool, device: torch.device
) -> BaseModel:
    """Builds an image model; every parameter is new and every layer a site with bias.

    Raises:
        ConfigError: the task has no images, or a setting is unknown or has no effect here.
    """
    _check_settings(model, problem)
    settings = dict(model.architecture)
    build_layers = _LAYERS[settings.pop("model_type")]
    with seeded_weights(seed, device), torch.device("meta") if on_meta else device:
        module = ImageModel(build_layers(problem, **settings))
    cast_parameters(module, model.dtype)
    return BaseModel(
        module=module.eval(),
        tokenizer=None,
        sites=resolve_sites(module, model, adapter_bias=True),
        new_parameters=stored_names(module),
    )


def _check_settings(model: ModelConfig, problem: Problem) -> None:
    if problem.objective is not Objective.image or problem.image_shape is None:
        raise ConfigError(
            f"model={model.name} takes images, but the task is {problem.objective.name}; "
            "choose a text model (tiny-roberta, tiny-gpt2, hf) or task=digits"
        )
    if model.path is not None or model.gradient_checkpointing:
        setting = "path" if model.path is not None else "gradient_checkpointing"
        raise ConfigError(f"model.{setting} has no effect on model={model.name}; leave it out")
    model_type = model.architecture.get("model_type")
    if model_type not in _LAYERS:
        raise ConfigError(
            f"model.architecture.model_type={model_type!r} is no image model; "
            f"choose from {', '.join(_LAYERS)}"
        )
    given, known = model.architecture.keys() - {"model_type"}, _SETTINGS[model_type]
    if given != known:
        raise ConfigError(
            f"model.architecture of model_type={model_type} takes {sorted(known)}, "
            f"given: {sorted(given)}"
        )


def _mlp_layers(problem: Problem, *, hidden: list[int]) -> OrderedDict[str, nn.Module]:
    assert problem.image_shape is not None
    widths = [prod(problem.image_shape), *hidden, problem.num_labels]
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    for index, (in_features, out_features) in enumerate(pairwise(widths), start=1):
        if index > 1:
            layers[f"relu{index - 1}"] = nn.ReLU()
        layers[f"linear{index}"] = nn.Linear(in_features, out_features)
    return layers


def _linear_layers(problem: Problem) -> OrderedDict[str, nn.Module]:
    assert problem.image_shape is not None
    linear = nn.Linear(prod(problem.image_shape), problem.num_labels)
    return OrderedDict[str, nn.Module](flatten=nn.Flatten(), linear=linear)


def _cnn_layers(problem: Problem, *, channels: list[int]) -> OrderedDict[str, nn.Module]:
    assert problem.image_shape is not None
    num_pools = len(channels) - 1
    if min(problem.image_shape[1:]) < 2**num_pools:
        raise ConfigError(
            f"images of {problem.image_shape[1]} x {problem.image_shape[2]} are too small for "
            f"{num_pools} halvings; shorten model.architecture.channels={channels}"
        )
    layers = OrderedDict[str, nn.Module]()
    for index, sizes in enumerate(pairwise([problem.image_shape[0], *channels]), start=1):
        layers[f"conv{index}"] = _convolution(*sizes)
        layers[f"relu{index}"] = nn.ReLU()
        if index <= num_pools:
            layers[f"pool{index}"] = nn.MaxPool2d(2)
    layers["average"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(channels[-1], problem.num_labels)
    return layers


def _convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Its weight lies channels last, and so does what it answers: a GPU's TF32 products want it."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=1, padding=1)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    weight = convolution.weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return convolution


_LAYERS: dict[str, Callable[..., OrderedDict[str, nn.Module]]] = {
    "linear": _linear_layers,
    "mlp": _mlp_layers,
    "cnn": _cnn_layers,
}
_SETTINGS: dict[Any, set[str]] = {"linear": set(), "mlp": {"hidden"}, "cnn": {"channels"}}
