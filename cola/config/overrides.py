"""Checks override strings (`trainer.epochs=3`, `adapter=mlp`) before anything is composed.

Hydra names neither the nearest key nor the choices of a mistyped one; here every message says what
was given, what is allowed and the nearest match. Part of the command line's edge (uses Hydra's own
parser, so that quoting and sweeps mean the same as below).
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cola.config.groups import choice_families, group_choices
from cola.config.keys import (
    Key,
    entry_keys,
    find_key,
    nearest_words,
    schema_keys,
    section_names,
)
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError

_HELP = "--help lists all"
_REASONS = {
    ("model.dtype", "float16"): (
        "hidden gradients underflow in float16 unless the loss is scaled, and whether a scale was "
        "too large is known after the whole backward pass, when fits have begun; use bfloat16 (as "
        "small and as fast) or float32"
    ),
}
"""Values that a user may well expect to work, and why they cannot."""

_PREFIXES = {
    OverrideType.CHANGE: "",
    OverrideType.ADD: "+",
    OverrideType.FORCE_ADD: "++",
    OverrideType.DEL: "~",
}


@dataclass(frozen=True, kw_only=True)
class CheckedOverrides:
    """Overrides that name existing groups, choices and keys.

    Attributes:
        lines: the strings to hand to Hydra.
        given: groups and keys that were given explicitly, without those of Hydra itself.
    """

    lines: list[str]
    given: frozenset[str]


def check_overrides(overrides: Sequence[str], *, is_sweep: bool = False) -> CheckedOverrides:
    """Checks names, choices and types of overrides.

    Args:
        overrides: as written on the command line.
        is_sweep: values may be several (`a,b`, `range(1,4)`); those are checked job by job.

    Raises:
        ConfigError: the first override that cannot be meant.
    """
    groups = group_choices()
    parsed = [_parse(line) for line in overrides]
    has_own_groups = any(override.key_or_group == "hydra.searchpath" for override in parsed)
    lines = []
    for line, override in zip(overrides, parsed, strict=True):
        name = override.key_or_group
        if is_hydra_line(line):
            lines.append(line)
            continue
        if override.is_sweep_override() and not (is_sweep and override.is_discrete_sweep()):
            raise ConfigError(_sweep_message(line, is_sweep))
        if name in groups:
            # With a search path of the user's own, only Hydra knows all choices.
            choices = None if has_own_groups else groups[name]
            lines.append(_check_group(line, override, choices))
        else:
            lines.append(_check_key(line, override, groups))
    given = frozenset(
        override.key_or_group
        for line, override in zip(overrides, parsed, strict=True)
        if not is_hydra_line(line)
    )
    return CheckedOverrides(lines=lines, given=given)


def is_hydra_line(line: str) -> bool:
    """Whether an override sets Hydra itself (`hydra.run.dir=...`, `hydra/launcher=...`)."""
    return line.lstrip("+~").startswith(("hydra.", "hydra/"))


def _parse(line: str) -> Override:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{line}: not an override ({reason}); write key=value or group=choice, and quote a "
            "value that holds , : = { } [ ] or spaces, for example 'data_dir=\"my, data\"'"
        ) from None


def _sweep_message(line: str, is_sweep: bool) -> str:
    if is_sweep:
        return f"{line}: an interval has no jobs of its own; list values (a,b) or range(start,stop)"
    return f"{line}: several values; add -m for a sweep, write [a,b] for a list, or quote a text"


def _check_group(line: str, override: Override, choices: Collection[str] | None) -> str:
    """Checks a group's choice; returns the override for Hydra."""
    group = override.key_or_group
    if override.package is not None:
        raise ConfigError(f"{line}: a group cannot be moved; write {group}=CHOICE")
    if override.is_delete():
        if group != "experiment":
            raise ConfigError(f"{line}: {group} cannot be left out; write {group}=CHOICE")
        return line
    # Every group stands in the defaults list, so `+` (which Hydra would refuse) means the same.
    line = line.lstrip("+")
    if override.is_sweep_override() or choices is None:
        return line
    choice = override.value()
    if choice in choices or (choice is None and group == "experiment"):
        return line
    near = nearest_words(str(choice), choices)
    allowed = ", ".join(
        f"{name}_{{{','.join(ends)}}}" if ends else name
        for name, ends in choice_families(sorted(choices))
    )
    raise ConfigError(f"{line}: no such choice of {group}; {near}allowed: {allowed or 'none yet'}")


def _check_key(line: str, override: Override, groups: Mapping[str, Collection[str]]) -> str:
    """Checks a dotted key and its value; returns the override for Hydra."""
    name = override.key_or_group
    key = find_key(name)
    if key is None:
        raise ConfigError(_unknown_key(line, override, groups))
    if override.is_delete():
        if key.is_open and name != key.path:
            return line
        raise ConfigError(f"{line}: a key cannot be deleted; set {name} to {key.allowed}")
    if key.is_list:
        line = _with_brackets(line, override, key)
        override = _parse(line)
    if not override.is_sweep_override():
        _check_value(line, override, key)
    # A free dictionary takes keys that no YAML names; every other key exists already.
    return ("++" if key.is_open and name != key.path else "") + line.lstrip("+")


def _with_brackets(line: str, override: Override, key: Key) -> str:
    """The override of a list in which one value stands for a list of one: `model.sites=all`."""
    value = override._value  # value() would drop the quotes
    choices: list[Any] = value.list if isinstance(value, ChoiceSweep) else [value]
    if not any(_stands_alone(choice, key) for choice in choices):
        return line
    listed = [[choice] if _stands_alone(choice, key) else choice for choice in choices]
    words = ",".join(Override._get_value_element_as_str(choice) for choice in listed)
    return f"{line.partition('=')[0]}={words}"


def _stands_alone(value: object, key: Key) -> bool:
    """Whether it is one element, no list, and neither nothing nor a reference to another key."""
    text = value.text if isinstance(value, QuotedString) else value
    if isinstance(text, str):
        return text != "" and not text.startswith("${")
    return isinstance(text, dict if key.entry else int | float)


def _unknown_key(line: str, override: Override, groups: Mapping[str, Collection[str]]) -> str:
    given = _PREFIXES[override.type] + line.lstrip("+~")
    name = override.key_or_group
    section = name.split(".")[0]
    if name in section_names():
        return f"{given}: {name} is a section, not a value; set one of {_keys_of(name)}"
    if "." in name and section in section_names():
        near = nearest_words(name, schema_keys())
        return f"{given}: no such key; {near}allowed: {_keys_of(section)}"
    near = nearest_words(name, [*groups, *section_names(), *schema_keys()])
    plain = [path for path in schema_keys() if "." not in path]
    sections = [f"{name}.*" for name in section_names() if name not in groups]
    return (
        f"{given}: no such group or key; {near}groups: {', '.join(groups)}; "
        f"keys: {', '.join([*plain, *sections])} ({_HELP})"
    )


def _keys_of(section: str) -> str:
    names = (path.removeprefix(f"{section}.") for path in schema_keys() if f"{section}." in path)
    return f"{section}.{{{','.join(names)}}}"


@functools.cache
def _shared_probe() -> DictConfig:
    """A configuration to try values in; made once, because that takes a hundredth of a second."""
    return cast(DictConfig, OmegaConf.structured(ExperimentConfig))


def _check_value(line: str, override: Override, key: Key) -> None:
    value = override.value()
    if key.entry and isinstance(value, list):
        for entry in value:
            _check_entry(line, entry, key)
    # What a free dictionary was given once decides what it takes next, so it gets a fresh one.
    probe = OmegaConf.structured(ExperimentConfig) if key.is_open else _shared_probe()
    try:
        OmegaConf.update(probe, override.key_or_group, value)
    except OmegaConfBaseException:
        if reason := _REASONS.get((key.path, str(value))):
            raise ConfigError(f"{line}: {reason}") from None
        near = nearest_words(str(value), key.choices) if key.choices else ""
        raise ConfigError(f"{line}: wrong value; {near}allowed: {key.allowed}") from None


def _check_entry(line: str, entry: Any, key: Key) -> None:
    """Checks one {name: value, ...} of a list, since OmegaConf does not say where it failed."""
    known = entry_keys(key)
    if not isinstance(entry, dict):
        raise ConfigError(f"{line}: wrong value; allowed: {key.allowed}")
    for name, value in entry.items():
        if name not in known:
            near = nearest_words(str(name), known)
            raise ConfigError(
                f"{line}: no such key '{name}' in an entry; {near}allowed: {', '.join(known)}"
            )
        try:
            OmegaConf.update(OmegaConf.structured(key.entry), name, value)
        except OmegaConfBaseException:
            field = known[name]
            near = nearest_words(str(value), field.choices) if field.choices else ""
            raise ConfigError(
                f"{line}: wrong value of '{name}'; {near}allowed: {field.allowed}"
            ) from None
    for name, field in known.items():
        if field.default == "???" and name not in entry:
            raise ConfigError(f"{line}: an entry lacks '{name}'; give it {field.allowed}")
