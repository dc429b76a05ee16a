"""Which sub-modules of a base model get an adapter: turns `model.sites` into named shapes.

Paper: the choice of m = 1..M. Entries are last parts of module names (`query`), dotted suffixes
(`attention.self.query`), full names, patterns (`*.attention.*`), or one of two words, which win
over a module of that name: `qv`, the attention inputs that the peft library adapts in a model of
this type, and `all`, every layer that can be tapped but the output embeddings. New heads are always
sites, because gradient learning has no other trainable parameter.
"""

import re
from collections.abc import Collection
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from cola.config.schema import ModelConfig
from cola.errors import SiteError
from cola.models.base import model_label
from cola.sites import SiteName, SiteSpec, describe_site, is_site_module

QV, ALL = "qv", "all"
"""Entries that name sites by what they are for."""

_NUM_NEAREST = 2  # names that an error suggests


def resolve_sites(
    module: nn.Module,
    model: ModelConfig,
    *,
    default: str = ALL,
    heads: Collection[SiteName] = (),
    adapter_bias: bool = False,
) -> dict[SiteName, SiteSpec]:
    """Finds the sites of a base model.

    Args:
        module: the base model.
        model: its configuration; `model.sites` wins over the default.
        default: entry that holds if `model.sites` is None.
        heads: names of newly initialised heads, added whatever the entries say.
        adapter_bias: whether a linear adapter has a bias at sites that are no heads.

    Returns:
        Shapes by name, in the order in which the module lists its sub-modules. A module that is
        known under two names counts once, under the first.

    Raises:
        SiteError: an entry matches no module or only modules that cannot be tapped, or nothing
            is left to adapt.
    """
    selected = set(heads)
    for entry in model.sites if model.sites is not None else [default]:
        if entry == ALL:
            selected |= _all_sites(module)
            continue
        names = attention_sites(module, model) if entry == QV else [entry]
        for name in names:
            selected |= _match(name, module, model, heads)
    if not selected:
        raise SiteError(
            f"{model_label(model)} has no site: model.sites is empty and it has no new head; "
            f"set model.sites to some of {', '.join(_last_parts(module, heads))}"
        )
    return {
        name: describe_site(
            name,
            child,
            adapter_bias=_has_bias(child) if name in heads else adapter_bias,
            is_head=name in heads,
        )
        for name, child in module.named_modules()
        if name in selected
    }


def attention_sites(module: nn.Module, model: ModelConfig) -> list[str]:
    """What `qv` stands for: entries that the peft library takes for the model's type.

    Raises:
        SiteError: peft knows none for the type.
    """
    config: Any = getattr(module, "config", None)
    if config is None:
        raise SiteError(
            f"model.sites=[{QV}] names attention layers, and {model.name} has none; "
            f"set model.sites to {ALL} or some of {', '.join(_last_parts(module))}"
        )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets = KNOWN.get(config.model_type)
    if targets is None:
        raise SiteError(
            f"{QV} means nothing yet for {model_label(model)} of model type {config.model_type!r}; "
            f"set model.sites to {ALL} or some of {', '.join(_last_parts(module))}"
        )
    if isinstance(targets, str):  # a regular expression over full names
        return [name for name, _ in module.named_modules() if re.fullmatch(targets, name)]
    return list(targets)


def _all_sites(module: nn.Module) -> set[SiteName]:
    """Every layer that can be tapped, but not the one that turns hidden states into words."""
    find_output: Any = getattr(module, "get_output_embeddings", lambda: None)
    output = find_output()
    return {name for name in site_modules(module) if module.get_submodule(name) is not output}


def site_modules(module: nn.Module) -> list[SiteName]:
    """Names of all sub-modules that can be tapped, in order."""
    return [name for name, child in module.named_modules() if is_site_module(child)]


def _match(
    entry: str, module: nn.Module, model: ModelConfig, heads: Collection[SiteName]
) -> set[SiteName]:
    first_names = {child: name for name, child in module.named_modules()}
    matched = {
        child
        for name, child in module.named_modules(remove_duplicate=False)
        if name and _is_named(name, entry)
    }
    if not matched:
        nearest = ", ".join(_nearest(entry, _last_parts(module, heads)))
        raise SiteError(
            f"model.sites={[entry]} match no module of {model_label(model)}; "
            f"nearest: {nearest}; set model.sites to one of them"
        )
    supported = {first_names[child] for child in matched if is_site_module(child)}
    if not supported:
        types = ", ".join(sorted({type(child).__name__ for child in matched}))
        raise SiteError(
            f"model.sites={[entry]} match only {types} in {model_label(model)}; adapters attach "
            f"to Linear, Conv1D and Conv2d: choose from {', '.join(_last_parts(module, heads))}"
        )
    return supported


def _is_named(name: SiteName, entry: str) -> bool:
    if name == entry or name.endswith(f".{entry}"):
        return True
    return fnmatchcase(name, entry) or fnmatchcase(name.rpartition(".")[2], entry)


def _last_parts(module: nn.Module, heads: Collection[SiteName] = ()) -> list[str]:
    names = [name for name in site_modules(module) if name not in heads]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _nearest(entry: str, candidates: list[str]) -> list[str]:
    last_part = entry.rpartition(".")[2]
    # Not difflib.get_close_matches: equally near names keep the model's order.
    ranked = sorted(candidates, key=lambda name: -SequenceMatcher(None, name, last_part).ratio())
    return ranked[:_NUM_NEAREST]


def _has_bias(module: nn.Module) -> bool:
    # A bias that the head itself lacks could be neither merged nor exported.
    return getattr(module, "bias", None) is not None
