"""What makes two runs the same run: the configuration's hash, and its file in the run's folder."""

import dataclasses
import hashlib
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cola.config.defaults import resolve_defaults
from cola.config.keys import flatten
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"

# Settings that change neither what is computed nor on what: a run may be resumed under others.
_NOT_IDENTITY = (
    "experiment_name",  # names the folder
    "bench.",
    "resume",
    "dry_run",
    "tracking.",
    "checkpoint.",
    "trainer.log_every",
)
_DEVICES = ("device", "offload.device")


def is_identity(key: str) -> bool:
    """Whether a dotted key belongs to what a run computes.

    `device`, `data_dir` and `offload` do: results are equal in bits on one kind of machine only,
    and paths stand for the data. Which of several GPUs does not, see `identity_value`.
    """
    return not key.startswith(_NOT_IDENTITY)


def identity_value(key: str, value: Any) -> Any:
    """What of a setting decides what is computed: of `cuda:1` that it is a GPU, not which one.

    The GPUs of a machine compute the same, and a sweep that is started again takes whichever is
    free.
    """
    if key not in _DEVICES:
        return _plain(value)
    if isinstance(value, list):
        return [identity_value(key, one) for one in value]
    return None if value is None else re.sub(r"^cuda:\d+$", "cuda", value)


def _plain(value: Any) -> Any:
    """A value as JSON has it: enums by name, entries of lists as dictionaries."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if dataclasses.is_dataclass(value):
        return {name: _plain(part) for name, part in vars(value).items()}
    return value


def config_hash(config: ExperimentConfig) -> str:
    """Stable sha256 (16 hexadecimal digits) over the identity keys, defaults filled in.

    The same for a configuration given by an experiment file or key by key, before and after
    `resolve_defaults`.
    """
    values = flatten(resolve_defaults(config))
    identity = {k: identity_value(k, value) for k, value in values.items() if is_identity(k)}
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_yaml(config: ExperimentConfig) -> str:
    """A run's whole configuration as YAML text."""
    return OmegaConf.to_yaml(_of_a_run(config))


def config_values(config: ExperimentConfig) -> dict[str, Any]:
    """A run's whole configuration as nested dictionaries of plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(_of_a_run(config), enum_to_str=True))


def _of_a_run(config: ExperimentConfig) -> DictConfig:
    """Without `bench`, which no run reads."""
    whole = OmegaConf.structured(config)
    return OmegaConf.masked_copy(whole, [key for key in vars(config) if key != "bench"])


def save_config(config: ExperimentConfig, path: Path) -> None:
    """Writes a configuration so that `load_config` gives an equal one back."""
    path.write_text(config_yaml(config), encoding="utf-8")


def load_config(path: Path) -> ExperimentConfig:
    """Reads a configuration that `save_config` wrote.

    Raises:
        ConfigError: the file is missing, broken, or of an incompatible version.
    """
    try:
        stored = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), stored)
        return cast(ExperimentConfig, OmegaConf.to_object(merged))
    except (OSError, YAMLError, OmegaConfBaseException, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{path}: not a readable configuration ({reason}); a run's folder holds the one it "
            "was started with, in config.yaml"
        ) from None
