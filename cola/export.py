"""Adapters as files that other tools load: safetensors with a description, and PEFT folders.

`adapters/adapters.safetensors` holds every adapter under `<site>/<parameter>`; `adapters.json` says
what each is. Low-rank adapters of a text model are also written as `adapters/peft`, which
`PeftModel.from_pretrained` loads onto the same base.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cola.adapters import Adapter, LowRankAdapter, describe_adapter, require_mergeable
from cola.config.choices import Objective
from cola.sites import SiteKind, SiteName, SiteSpec, to_base_layout

FORMAT_VERSION = 1
ADAPTERS, DESCRIPTION = "adapters.safetensors", "adapters.json"
PEFT_TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
_PEFT_HEADS = {"classifier", "score"}
TASK_TYPES = {
    Objective.classification: "SEQ_CLS",
    Objective.regression: "SEQ_CLS",
    Objective.causal: "CAUSAL_LM",
    Objective.seq2seq: "SEQ_2_SEQ_LM",
}


def export_run(
    folder: Path,
    adapters: Mapping[SiteName, Adapter],
    heads: Mapping[str, Tensor],
    *,
    scale: float,
    base: str,
    objective: Objective,
) -> None:
    """Writes all adapters of a run, and the PEFT folder where PEFT can hold them."""
    export_adapters(folder, adapters, scale=scale, base=base)
    if can_export_peft(adapters, objective):
        export_peft(folder / "peft", adapters, heads, scale=scale, base=base, objective=objective)


def export_adapters(
    folder: Path, adapters: Mapping[SiteName, Adapter], *, scale: float, base: str
) -> None:
    """Writes all adapters of a run.

    Args:
        folder: made if missing.
        adapters: by site.
        scale: alpha, which multiplies every adapter's output.
        base: name or path of the base model, for the description.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{site}/{name}": parameter.detach().cpu().contiguous()
        for site, adapter in adapters.items()
        for name, parameter in adapter.named_parameters()
    }
    save_file(tensors, folder / ADAPTERS)
    described = {
        "format_version": FORMAT_VERSION,
        "base_model": base,
        "scale": scale,
        "adapters": {site: describe_adapter(adapter) for site, adapter in adapters.items()},
    }
    _write_json(folder / DESCRIPTION, described)


def can_export_peft(adapters: Mapping[SiteName, Adapter], objective: Objective) -> bool:
    """Whether all adapters but those of new heads are low-rank, on a text model."""
    body = [adapter for adapter in adapters.values() if not adapter.spec.is_head]
    return (
        objective in TASK_TYPES
        and bool(body)
        and all(isinstance(adapter, LowRankAdapter) for adapter in body)
    )


def head_names(base_model: nn.Module, sites: Iterable[SiteSpec]) -> list[str]:
    """Outermost modules of classification heads: the new ones, and those that PEFT saves anyway."""
    names = {spec.name.split(".")[0] for spec in sites if spec.is_head} | _PEFT_HEADS
    return [name for name, _ in base_model.named_children() if name in names]


def head_weights(base_model: nn.Module, sites: Iterable[SiteSpec]) -> dict[str, Tensor]:
    """Copies of the classification heads that a PEFT folder has to carry whole.

    To be taken before training: a merge changes the weights in use. PEFT saves the heads of every
    sequence classifier, new or not.
    """
    return {
        key: value.detach().cpu().clone()
        for name in head_names(base_model, sites)
        for key, value in base_model.get_submodule(name).state_dict(prefix=f"{name}.").items()
    }


def export_peft(
    folder: Path,
    adapters: Mapping[SiteName, Adapter],
    heads: Mapping[str, Tensor],
    *,
    scale: float,
    base: str,
    objective: Objective,
) -> None:
    """Writes low-rank adapters as a PEFT LoRA folder; heads go along whole, as saved modules.

    Args:
        folder: made if missing.
        adapters: by site; `can_export_peft` must hold.
        heads: from `head_weights`.
        scale: alpha; `lora_alpha` is alpha * rank.
        base: id or path that PEFT users load the base model from.
        objective: names PEFT's task type.
    """
    tensors: dict[str, Tensor] = {}
    rank = 0
    saved = sorted({key.split(".")[0] for key in heads})
    body = {s: adapter for s, adapter in adapters.items() if s.split(".")[0] not in saved}
    for site, adapter in body.items():
        assert isinstance(adapter, LowRankAdapter)
        rank = adapter.lora_a.shape[0]
        tensors[f"{PEFT_PREFIX}{site}.lora_A.weight"] = adapter.lora_a
        tensors[f"{PEFT_PREFIX}{site}.lora_B.weight"] = adapter.lora_b
    for key, value in heads.items():
        tensors[PEFT_PREFIX + key] = _with_delta(key, value, adapters, scale)
    config = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[objective],
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(body),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(a.spec.kind is SiteKind.conv1d for a in body.values()),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(stored, folder / PEFT_TENSORS, metadata={"format": "pt"})
    _write_json(folder / PEFT_CONFIG, config)


@torch.no_grad()
def _with_delta(
    key: str, value: Tensor, adapters: Mapping[SiteName, Adapter], scale: float
) -> Tensor:
    site, _, leaf = key.rpartition(".")
    adapter = adapters.get(site)
    if adapter is None:
        return value
    adapter = require_mergeable(adapter)
    delta = {
        "weight": to_base_layout(adapter.delta_weight(), adapter.spec),
        "bias": adapter.delta_bias(),
    }[leaf]
    return value if delta is None else value + scale * delta.to(value)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
