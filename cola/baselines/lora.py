"""LoRA through the PEFT library, set up as the mirror of the low-rank adapter.

Every site's A comes from the same generator as `adapter=lowrank` of the same seed. New heads train
as a delta on their frozen random weights, as gradient learning does it, so that weight decay pulls
both methods towards the same point and their loss curves are one curve.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cola.adapters import Adapter, LinearAdapter, LowRankAdapter, adapter_generator
from cola.config.choices import AdapterDType
from cola.config.schema import AdapterConfig
from cola.sites import SiteKind, SiteName, SiteSpec


class _Delta(nn.Module):
    """Parametrization: frozen value plus scaled trainable delta."""

    def __init__(self, frozen: Tensor, scale: float) -> None:
        super().__init__()
        self._scale = scale
        self.register_buffer("frozen", frozen.detach().clone(), persistent=False)
        self.frozen: Tensor

    def forward(self, delta: Tensor) -> Tensor:
        return self.frozen + self._scale * delta


def inject_lora(
    model: nn.Module,
    sites: Mapping[SiteName, SiteSpec],
    config: AdapterConfig,
    *,
    seed: int,
    dtype: AdapterDType = AdapterDType.float32,
) -> tuple[dict[str, nn.Parameter], Callable[[], dict[SiteName, Adapter]]]:
    """Adds LoRA layers to a model in place.

    Args:
        model: the base model, on its device.
        sites: where; heads get a full delta.
        config: rank and alpha (`lora_alpha` is alpha * rank, so alpha is the scale).
        seed: of the adapters.
        dtype: of A and B; a delta of a head has the base model's.

    Returns:
        Trainable parameters by name, and a function that gives the trained adapters by site.
    """
    inner = {name: spec for name, spec in sites.items() if not spec.is_head}
    heads = {name: spec for name, spec in sites.items() if spec.is_head}
    if inner:
        _inject_peft(model, inner, config)
    trainable: dict[str, nn.Parameter] = {}
    for name, spec in inner.items():
        layer = model.get_submodule(name)
        reference = LowRankAdapter(spec, config.rank)
        reference.reset_parameters(adapter_generator(seed, name))
        for key, value in (("lora_A", reference.lora_a), ("lora_B", reference.lora_b)):
            parameter = layer.get_parameter(f"{key}.default.weight")
            wide = torch.promote_types(parameter.dtype, torch.float32)
            own = parameter.dtype if dtype is AdapterDType.base else wide
            parameter.data = value.detach().to(parameter.device, own)
            trainable[f"{name}.{key}.default.weight"] = parameter
    for name in heads:
        trainable |= _train_delta(model, name, config.alpha)
    return trainable, lambda: _collect(model, sites, config)


def _inject_peft(
    model: nn.Module, sites: Mapping[SiteName, SiteSpec], config: AdapterConfig
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    kinds = {spec.kind for spec in sites.values()}
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha * config.rank,  # type: ignore[arg-type]
        # A string is matched as a whole: a list would also match names that merely end alike.
        target_modules="|".join(re.escape(name) for name in sites),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=SiteKind.conv1d in kinds,
    )
    inject_adapter_in_model(settings, model)


def _train_delta(model: nn.Module, name: SiteName, scale: float) -> dict[str, nn.Parameter]:
    module = model.get_submodule(name)
    trainable = {}
    for key in [key for key, _ in module.named_parameters(recurse=False)]:
        frozen = module.get_parameter(key)
        parametrize.register_parametrization(module, key, _Delta(frozen, scale), unsafe=True)
        delta = module.get_parameter(f"parametrizations.{key}.original")
        delta.data = torch.zeros_like(delta)
        trainable[f"{name}.parametrizations.{key}.original"] = delta
    return trainable


def _collect(
    model: nn.Module, sites: Mapping[SiteName, SiteSpec], config: AdapterConfig
) -> dict[SiteName, Adapter]:
    adapters: dict[SiteName, Adapter] = {}
    for name, spec in sites.items():
        module = model.get_submodule(name)
        if spec.is_head:
            adapter: Adapter = LinearAdapter(spec)
            keys = {"weight": "parametrizations.weight.original",
                    "bias": "parametrizations.bias.original"}  # fmt: skip
        else:
            adapter = LowRankAdapter(spec, config.rank)
            keys = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
        with torch.no_grad():
            for own, other in keys.items():
                if own in dict(adapter.named_parameters()):
                    adapter.get_parameter(own).copy_(module.get_parameter(other))
        adapters[name] = adapter
    return adapters
