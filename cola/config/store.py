"""Composes a run's configuration from `conf/` and overrides; the only place of Hydra in a run.

Registers the schema (group `schema/experiment`) and the resolvers that name run folders when
imported. Below `compose_run` no DictConfig exists: the result is plain dataclasses.
"""

import contextlib
import dataclasses
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError

from cola.config.choices import MethodName, UsersMode
from cola.config.defaults import resolve_defaults
from cola.config.groups import conf_dir
from cola.config.keys import find_key, nearest_words
from cola.config.overrides import check_overrides
from cola.config.schema import ExperimentConfig
from cola.config.validation import validate
from cola.errors import ConfigError

HYDRA_VERSION_BASE = "1.3"
CONFIG_NAME = "config"


@dataclass(frozen=True, kw_only=True)
class ComposedRun:
    """A valid run.

    Attributes:
        config: typed, defaults filled in.
        run_dir: where the run would write; not made yet.
        given: groups and keys set explicitly.
    """

    config: ExperimentConfig
    run_dir: Path
    given: frozenset[str]


def _run_family(_root_: DictConfig) -> str:
    """The folder that related runs share: the experiment's name, else the task's."""
    return str(_root_.experiment_name or _root_.task.name)


def _run_id(_root_: DictConfig) -> str:
    """`20261122-075501-mrpc-cola-lowrank-s0-3fa9c1`: sorts by time, says what it is, is unique.

    With several users `joint-lowrank` or `alone-lowrank-linear` in the place of `lowrank`. The last
    part is random, for jobs of one sweep that start in the same second.
    """
    method, users = _root_.method.name, _root_.users
    parts = [_root_.task.subset or _root_.task.name, method.name]
    if users.name is not UsersMode.one:
        parts.append(users.name.name)
    if method is MethodName.cola:
        parts += dict.fromkeys(users.kinds or [_root_.adapter.kind.name])
    label = re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join([*parts, f"s{_root_.seed}"]))
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{label}-{secrets.token_hex(3)}"


def register() -> None:
    """Makes the schema and the resolvers known to Hydra; done on import, harmless to repeat.

    On import, because a launcher's worker process unpickles the job and imports this module before
    it resolves its run folder.
    """
    store = ConfigStore.instance()
    store.store(group="schema", name="experiment", node=ExperimentConfig, package="_global_")
    OmegaConf.register_new_resolver("run_family", _run_family, replace=True)
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True)


register()


@contextlib.contextmanager
def hydra_session() -> Iterator[Hydra]:
    """Hydra on `conf/`, also while another session is open (a job of a sweep, a caller's own)."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base=HYDRA_VERSION_BASE):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None  # initialised by the line above
            yield hydra
    finally:
        # Exiting replaces the singleton's object, hence looked up again.
        GlobalHydra.instance().hydra = outer


def compose_run(overrides: Sequence[str]) -> ComposedRun:
    """Composes, converts and validates one run.

    Args:
        overrides: strings such as `task=glue` or `optimizer.lr=1e-3`.

    Raises:
        ConfigError: any override or combination that cannot run.
    """
    run = compose_changes(overrides)
    validate(run.config, run.given)
    return dataclasses.replace(run, config=resolve_defaults(run.config))


def compose_changes(overrides: Sequence[str]) -> ComposedRun:
    """Composes without checking the whole: settings to be put into another configuration.

    Raises:
        ConfigError: an override that cannot be meant.
    """
    checked = check_overrides(overrides)
    try:
        with hydra_session():
            composed = compose(CONFIG_NAME, overrides=checked.lines, return_hydra_config=True)
        return ComposedRun(
            config=_to_config(composed),
            run_dir=Path(str(composed.hydra.run.dir)),
            given=checked.given,
        )
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explain(error)) from None


def compose_config(overrides: Sequence[str]) -> ExperimentConfig:
    """The configuration of one run, valid and with defaults filled in; see `compose_run`."""
    return compose_run(overrides).config


def _to_config(composed: DictConfig) -> ExperimentConfig:
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    # Hydra's root is a plain node: merging into the schema gives it its type back.
    typed = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), own)
    return cast(ExperimentConfig, OmegaConf.to_object(typed))


def explain(error: Exception) -> str:
    """One line out of an error of Hydra or OmegaConf: where, what, and what is allowed."""
    # Whichever carries a key: Hydra wraps OmegaConf's error, and under a debugger or coverage
    # OmegaConf chains a raw one below its own.
    chain = [part for part in (error, error.__cause__) if part is not None]
    cause = next((part for part in chain if getattr(part, "full_key", None)), error)
    path = getattr(cause, "full_key", None)
    key = find_key(path) if isinstance(path, str) else None
    if isinstance(cause, MissingMandatoryValue) and key is not None:
        return f"{key.path}: no value given; set it to {key.allowed}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and path is not None:
        return _unknown_hydra_key(path, cause.object_type)
    message = "; ".join(dict.fromkeys(filter(None, map(_first_sentence, (error, cause)))))
    options = getattr(error, "options", None)  # of a choice that a file or hydra/... names
    if options:
        return f"{message}; allowed: {', '.join(options)}"
    return f"{message}; allowed: {key.path} is {key.allowed}" if key is not None else message


def _unknown_hydra_key(path: str, owner: object) -> str:
    """For `hydra.*` keys, which `check_overrides` leaves to Hydra; ours are known by then."""
    fields = dataclasses.fields(owner) if isinstance(owner, type) and is_dataclass(owner) else ()
    known = [field.name for field in fields if not field.name.startswith("_")]
    section, _, name = path.rpartition(".")
    if not known and section == "hydra.launcher":
        return f"{path}: this launcher takes no keys; add hydra/launcher=parallel"
    return f"{path}: no such key; {nearest_words(name, known)}allowed: {', '.join(known)}"


def _first_sentence(error: BaseException) -> str:
    """The first line, with the next one where it only announces that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
