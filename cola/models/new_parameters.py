"""Which parameters of a Hugging Face model no pretrained file holds.

New heads are found by the keys that the files lack. Everything else that is missing is either a
small gap, which is named, or a sign that files and configuration do not belong together.
"""

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from cola.config.schema import ModelConfig
from cola.errors import ConfigError
from cola.models.architecture import is_classifier
from cola.models.base import model_label, stored_names
from cola.models.hub import PretrainedSource, stored_shapes
from cola.models.site_selection import site_modules
from cola.sites import SiteName
from cola.task_data import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_MAX_LISTED = 8  # names in a log line


def outer_sites(module: "PreTrainedModel") -> list[SiteName]:
    """Layers of a classifier's head: those outside of what is pretrained."""
    inner = f"{module.base_model_prefix}."
    return [name for name in site_modules(module) if not name.startswith(inner)]


def absent_on_meta(
    module: "PreTrainedModel", problem: Problem, source: PretrainedSource
) -> frozenset[str]:
    """Names of a classifier's head that the files lack, or hold in another shape."""
    if not is_classifier(problem):
        return frozenset()
    heads = tuple(f"{name}." for name in outer_sites(module))
    stored = stored_shapes(source)
    return frozenset(
        name
        for name, parameter in module.named_parameters()
        if name.startswith(heads) and stored.get(name) != tuple(parameter.shape)
    )


def absent_names(
    model: ModelConfig, problem: Problem, module: "PreTrainedModel", info: dict[str, Any]
) -> frozenset[str]:
    """Names of everything that was not loaded, by the library's loading report.

    Raises:
        ConfigError: the files do not fit config.json.
    """
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    names = stored_names(module)
    absent = names & (set(info["missing_keys"]) | mismatched)
    # A model that writes has no new head: all of it is pretrained.
    prefix = f"{module.base_model_prefix}." if is_classifier(problem) else ""
    inner = {name for name in names if name.startswith(prefix)}
    if inner and (inner <= absent or inner & mismatched):
        raise ConfigError(
            f"model.path={model.path}: the weights do not fit config.json; of the "
            f"{len(inner)} tensors of {type(module).__name__} below its heads "
            f"{len(inner & absent)} are missing or of another shape, first "
            f"{min(inner & absent)}"
        )
    if absent & inner:
        logger.warning("not in %s, hence random: %s", model.path, _listed(absent & inner))
    if absent - inner:
        logger.info("newly initialised in %s: %s", model_label(model), _listed(absent - inner))
    return absent


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_MAX_LISTED])
    return shown if len(names) <= _MAX_LISTED else f"{shown} and {len(names) - _MAX_LISTED} more"
