"""Composed configurations that the tests of `cola.config` share."""

import copy
import functools
from collections.abc import Sequence

import yaml
from omegaconf import OmegaConf

from cola.config.schema import ExperimentConfig
from cola.config.store import ComposedRun, compose_run


@functools.cache
def _composed(*overrides: str) -> ComposedRun:
    return compose_run(overrides)


def composed(*overrides: str) -> ComposedRun:
    # Composing takes a sixth of a second, so equal ones are shared.
    return copy.deepcopy(_composed(*overrides))


def changed(*overrides: str, base: Sequence[str] = ()) -> ExperimentConfig:
    """A composed configuration, the default one at first, with values put in, not checked."""
    node = OmegaConf.structured(composed(*base).config)
    for override in overrides:
        key, _, value = override.partition("=")
        OmegaConf.update(node, key, yaml.safe_load(value))
    return OmegaConf.to_object(node)
