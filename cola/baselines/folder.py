"""Trained baselines of the PEFT library as PEFT folders.

`PeftModel.from_pretrained` loads a folder onto the base model that the run started from.
"""

import copy
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cola.baselines.adalora import ADAPTER
from cola.export import PEFT_PREFIX, PEFT_TENSORS


@torch.no_grad()
def save_peft_folder(
    folder: Path,
    *,
    peft_model: Any,
    heads: Mapping[str, nn.Parameter],
    base: str,
    task_type: str,
) -> None:
    """Writes the parameters and the settings of a trained PEFT model.

    Args:
        folder: made if missing.
        peft_model: a PeftModel, which is not typed.
        heads: parameters of heads that were trained in place, which PEFT does not know of, by
            their names in the base model.
        base: id or path that PEFT users load the base model from.
        task_type: PEFT's name of the task.
    """
    head_modules = sorted({key.split(".")[0] for key in heads})
    tensors, settings = _body(peft_model, head_modules)
    settings.task_type, settings.base_model_name_or_path = task_type, base
    settings.inference_mode = True
    if heads:
        settings.modules_to_save = head_modules
        tensors |= _merged_heads(peft_model.get_base_model(), heads)
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because safetensors refuses tensors that share their memory.
    stored = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(stored, folder / PEFT_TENSORS, metadata={"format": "pt"})
    settings.save_pretrained(folder)


def _body(peft_model: Any, heads: Collection[str]) -> tuple[dict[str, Tensor], Any]:
    """What PEFT itself would save, without adapters inside the heads."""
    from peft import AdaLoraConfig, get_peft_model_state_dict

    settings = peft_model.peft_config[ADAPTER]
    saved, in_use = copy.deepcopy(settings), getattr(settings, "rank_pattern", None)
    if isinstance(settings, AdaLoraConfig):
        # All initial ranks, zero where they were taken away: PEFT would cut them out by the last
        # reallocation, after which some have come back, and cannot save a site without any.
        saved.rank_pattern, settings.rank_pattern = None, None
    tensors: dict[str, Tensor] = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    if isinstance(settings, AdaLoraConfig):
        settings.rank_pattern = in_use
    if heads:
        targets = peft_model.base_model.targeted_module_names
        body = [name for name in targets if not _is_in(heads, name)]
        saved.target_modules = "|".join(re.escape(name) for name in body)
        tensors = {
            key: value
            for key, value in tensors.items()
            if not _is_in(heads, key.removeprefix(PEFT_PREFIX))
        }
    return tensors, saved


def _is_in(heads: Collection[str], name: str) -> bool:
    return name.split(".")[0] in heads


def _merged_heads(base_model: nn.Module, heads: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Heads as one module each: an adapter inside is merged into its weight."""
    tensors: dict[str, Tensor] = {}
    for key, value in heads.items():
        owner, _, leaf = key.rpartition(".")
        layer: Any = base_model.get_submodule(owner)
        has_adapter = leaf == "weight" and hasattr(layer, "get_delta_weight")
        delta = layer.get_delta_weight(ADAPTER) if has_adapter else 0
        tensors[PEFT_PREFIX + key] = value + delta
    return tensors
