"""Where adapters start: `adapter.init` names a run's folder, its adapters, or a PEFT LoRA folder.

Everything has to fit (sites, kinds, shapes, alpha): nothing is cut, padded or scaled. Adapters of
new heads sit on randomly drawn weights, hence a run's own `base.safetensors` comes along with its
adapters. PEFT saves heads whole; what they are more than the base model's is the adapter.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cola.adapters import AdapterState, build_adapter
from cola.checkpoint import NEW_PARAMETERS, restore_parameters
from cola.config.choices import MethodName
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError
from cola.export import (
    ADAPTERS,
    DESCRIPTION,
    FORMAT_VERSION,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_TENSORS,
)
from cola.interfaces import Learner
from cola.models import BaseModel
from cola.sites import SiteName, to_base_layout

logger = logging.getLogger(__name__)

_LORA_NAMES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
_MAX_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """What a folder holds.

    Attributes:
        base_model: name or path of the model that the adapters were trained on.
        scale: alpha.
        states: parameters of the adapters by site.
        whole: parameters that stand for the base model's own, not for an adapter (PEFT's heads).
        drawn: the base model's parameters that no pretrained file holds; None where the folder
            does not say.
    """

    base_model: str
    scale: float
    states: dict[SiteName, dict[str, Tensor]]
    whole: dict[str, Tensor] = field(default_factory=dict)
    drawn: dict[str, Tensor] | None = None


def initial_adapters(config: ExperimentConfig, base: BaseModel) -> dict[SiteName, AdapterState]:
    """Reads what `adapter.init` names, and gives the base model the parameters that go with it.

    Args:
        config: of the run; without `adapter.init` nothing happens.
        base: before any adapter acts.

    Returns:
        Parameters by site, of the shapes that this run's adapters have; empty for the usual start.

    Raises:
        ConfigError: what the folder has and what this run needs differ.
    """
    init = config.adapter.init
    if init is None:
        return {}
    if config.method.name is not MethodName.cola:
        raise ConfigError(
            f"adapter.init={init} does not apply to method={config.method.name.name}; leave it "
            "out or use method=cola"
        )
    saved = _read(init)
    problems = [] if saved.drawn is None else _take_drawn(saved.drawn, base)
    states = saved.states | _head_states(saved, base)
    problems += _misfits(states, config, base)
    problems += _foreign(saved.whole, states, base)
    if saved.scale != config.adapter.alpha:
        problems.append(f"adapter.alpha is {saved.scale:g} there and {config.adapter.alpha:g} here")
    if problems:
        raise ConfigError(
            f"adapter.init={init} does not fit this run: {'; '.join(problems)}; set model, "
            "model.sites, adapter, adapter.rank, adapter.hidden and adapter.alpha as they were "
            "when these adapters were trained"
        )
    _log(init, saved, config)
    return dict(states)


@torch.no_grad()
def start_from(learner: Learner, states: Mapping[SiteName, AdapterState]) -> None:
    """Gives a learner's adapters these parameters before its first step."""
    if not states:
        return
    for site, adapter in learner.export().items():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(states[site][name])
    # Loading publishes: the base model's device has to see what its adapters now are.
    learner.load_state_dict(learner.state_dict())


def _read(init: str) -> _Saved:
    path = Path(init)
    try:
        for folder in (path / "adapters", path):
            if (folder / ADAPTERS).is_file():
                return _read_own(folder)
        if (path / PEFT_TENSORS).is_file():
            return _read_peft(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"adapter.init={init}: cannot be read ({error!r})") from error
    state = f"holds neither {ADAPTERS} nor {PEFT_TENSORS}" if path.is_dir() else "is no folder"
    raise ConfigError(
        f"adapter.init={init}: {state}; give the folder of a finished run (outputs/NAME/RUN_ID), "
        "its adapters folder, or a PEFT LoRA folder"
    )


def _read_own(folder: Path) -> _Saved:
    described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if described["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format {described['format_version']}, known is {FORMAT_VERSION}")
    states: dict[SiteName, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / ADAPTERS).items():
        site, _, name = key.partition("/")
        states.setdefault(site, {})[name] = tensor
    # In the run's folder: adapters of a user lie one folder deeper.
    places = [folder.parent / NEW_PARAMETERS, folder.parent.parent / NEW_PARAMETERS]
    drawn = next((place for place in places if place.is_file()), None)
    return _Saved(
        base_model=described["base_model"],
        scale=described["scale"],
        states=states,
        drawn={} if drawn is None else load_file(drawn),
    )


def _read_peft(folder: Path) -> _Saved:
    described: dict[str, Any] = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    special = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern")
    if described["peft_type"] != "LORA" or any(described.get(name) for name in special):
        raise ValueError(f"a plain LoRA is needed, without {', '.join(special)}")
    states: dict[SiteName, dict[str, Tensor]] = {}
    whole = {}
    for key, tensor in load_file(folder / PEFT_TENSORS).items():
        name = key.removeprefix(PEFT_PREFIX)
        suffix = next((end for end in _LORA_NAMES if name.endswith(f".{end}")), None)
        if suffix is None:
            whole[name] = tensor
        else:
            site = name.removesuffix(f".{suffix}")
            states.setdefault(site, {})[_LORA_NAMES[suffix]] = tensor
    return _Saved(
        base_model=described["base_model_name_or_path"],
        scale=described["lora_alpha"] / described["r"],
        states=states,
        whole=whole,
    )


def _take_drawn(drawn: Mapping[str, Tensor], base: BaseModel) -> list[str]:
    """Gives the base model the random parameters of the other run; says what does not fit."""
    own = base.module.state_dict()
    wanted = {name: own[name].shape for name in base.new_parameters & own.keys()}
    if {name: tensor.shape for name, tensor in drawn.items()} == wanted:
        restore_parameters(base.module, drawn)
        return []
    if not drawn:
        names = _listed(wanted)
        return [f"its adapters act on random parameters ({names}) of which no {NEW_PARAMETERS} "
                "is there: give the run's whole folder"]  # fmt: skip
    return [f"{NEW_PARAMETERS} and the base model have not the same new parameters: "
            f"{_listed(drawn.keys() ^ wanted.keys() or wanted)}"]  # fmt: skip


def _head_states(saved: _Saved, base: BaseModel) -> dict[SiteName, dict[str, Tensor]]:
    """Linear adapters of the sites whose weights were saved whole: what was added, by alpha."""
    own = base.module.state_dict()
    states: dict[SiteName, dict[str, Tensor]] = {}
    for key, tensor in saved.whole.items():
        site, _, name = key.rpartition(".")
        if site in base.sites and key in own and own[key].shape == tensor.shape:
            delta = (tensor - own[key].to(tensor)) / saved.scale
            layout = to_base_layout(delta, base.sites[site]) if name == "weight" else delta
            states.setdefault(site, {})[name] = layout
    return states


def _misfits(
    states: Mapping[SiteName, AdapterState], config: ExperimentConfig, base: BaseModel
) -> list[str]:
    """Differences between saved adapters and those that the run builds, in words."""
    problems = []
    if missing := base.sites.keys() - states.keys():
        problems.append(f"no adapter is there for {_listed(missing)}")
    if extra := states.keys() - base.sites.keys():
        problems.append(f"{_listed(extra)} have adapters there and none here")
    for site, spec in base.sites.items():
        with torch.device("meta"):
            adapter = build_adapter(config.adapter, spec, seed=config.seed)
        here = {name: list(parameter.shape) for name, parameter in adapter.named_parameters()}
        there = {name: list(tensor.shape) for name, tensor in states.get(site, {}).items()}
        if there and there != here:
            problems.append(f"{site} has {_shapes(there)} there and needs {_shapes(here)}")
            break
    return problems


def _foreign(
    whole: Mapping[str, Tensor], states: Mapping[SiteName, AdapterState], base: BaseModel
) -> list[str]:
    """Whole parameters that no adapter carries and that are not the base model's."""
    own = base.module.state_dict()
    foreign = [
        key
        for key, tensor in whole.items()
        if key.rpartition(".")[0] not in states
        and not (key in own and torch.equal(own[key], tensor.to(own[key])))
    ]
    return [f"{_listed(foreign)} changed there and are no sites here"] if foreign else []


def _log(init: str, saved: _Saved, config: ExperimentConfig) -> None:
    name = config.model.path or config.model.name
    logger.info("adapters start from %s", init)
    if saved.base_model != name:
        logger.warning("they were trained on %s, and this run has %s", saved.base_model, name)


def _listed(names: Any) -> str:
    shown = ", ".join(sorted(names)[:_MAX_LISTED])
    return shown if len(names) <= _MAX_LISTED else f"{shown} and {len(names) - _MAX_LISTED} more"


def _shapes(shapes: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
