"""The schema as dotted keys: their types and defaults, and the nearest match of a mistyped name.

Walks the dataclasses of `schema.py`, so that `--help`, the check of overrides and the identity of a
run can never disagree with it. No Hydra here: `--help` must answer at once.
"""

import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from cola.config.schema import ExperimentConfig

_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One setting: where it lives, what it takes, what it is without being set.

    Attributes:
        path: dotted name, such as `trainer.epochs`.
        type: its annotation in the schema.
        default: its default there; `???` where a group's choice has to give it.
    """

    path: str
    type: Any
    default: object

    @property
    def is_open(self) -> bool:
        """Whether any sub-key may be written below it (a free dictionary)."""
        return get_origin(self.type) is dict

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return any(get_origin(kind) is list for kind in (self.type, *get_args(self.type)))

    @property
    def entry(self) -> type | None:
        """The dataclass of a list's entries (`users.adapters`); None for lists of plain values."""
        elements = get_args(self.type) if get_origin(self.type) is list else ()
        return next((kind for kind in elements if is_dataclass(kind)), None)

    @property
    def allowed(self) -> str:
        """What may be written, in words."""
        return _describe(self.type)

    @property
    def choices(self) -> list[str]:
        """Names of an enum's members; empty for other types."""
        kinds = [kind for kind in (self.type, *get_args(self.type)) if isinstance(kind, type)]
        return [member.name for kind in kinds if issubclass(kind, Enum) for member in kind]


def _describe(annotation: Any) -> str:
    if get_origin(annotation) in (types.UnionType, typing.Union):
        parts = [_describe(part) for part in get_args(annotation) if part is not types.NoneType]
        return " or ".join([*parts, "null"])
    if get_origin(annotation) is list:
        return f"a list, each {_describe(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "any key: value pairs"
    if is_dataclass(annotation):
        return f"{{{', '.join(part.name for part in fields(annotation))}}}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(member.name for member in annotation)
    return _TYPE_WORDS.get(annotation, str(annotation))


def _walk(section: type, prefix: str) -> Iterable[Key]:
    hints = get_type_hints(section)
    for entry in fields(section):
        path, annotation = prefix + entry.name, hints[entry.name]
        if is_dataclass(annotation):
            yield from _walk(typing.cast(type, annotation), f"{path}.")
            continue
        default = entry.default if entry.default_factory is NO_DEFAULT else entry.default_factory()
        yield Key(path=path, type=annotation, default=default)


@functools.cache
def schema_keys() -> Mapping[str, Key]:
    """Every setting of `ExperimentConfig` by its dotted path, in the schema's order."""
    return {key.path: key for key in _walk(ExperimentConfig, "")}


@functools.cache
def section_names() -> tuple[str, ...]:
    """Names of the nodes below the root: `model`, `task`, ..., `checkpoint`."""
    return tuple(dict.fromkeys(path.split(".")[0] for path in schema_keys() if "." in path))


def entry_keys(key: Key) -> dict[str, Key]:
    """The fields of one entry of a list, by their names; empty for other keys."""
    return {part.path: part for part in _walk(key.entry, "")} if key.entry else {}


def find_key(path: str) -> Key | None:
    """The setting that a dotted path addresses; None if unknown.

    Paths reach through a free dictionary, and into lists where OmegaConf names an entry's field, as
    in `users.adapters[0].user`.
    """
    keys = schema_keys()
    if path in keys:
        return keys[path]
    if entry := re.fullmatch(r"(.+)\[\d+\](?:\.(.+))?", path):
        owner = keys.get(entry[1])
        field = owner and entry_keys(owner).get(entry[2])
        return replace(field, path=path) if field else owner
    return next((k for k in keys.values() if k.is_open and path.startswith(f"{k.path}.")), None)


def choice_key(group: str) -> str:
    """The key that names a group's choice: `adapter=mlp` sets `adapter.kind`."""
    special = {"adapter": "adapter.kind", "merge": "merge.mode", "experiment": "experiment_name"}
    return special.get(group, f"{group}.name")


def word(value: object) -> str:
    """A value as a user would write it; of a list's entries what is set."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(word(part) for part in value)}]"
    if is_dataclass(value):
        given = ((part.name, getattr(value, part.name)) for part in fields(value))
        return f"{{{','.join(f'{name}:{word(one)}' for name, one in given if one is not None)}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed name most like the given one, or None if none is close.

    A name without its section finds its home: `lr` is `optimizer.lr`, `epoch` is `trainer.epochs`;
    so does a name that only another section has: `merge.reduce` is `users.reduce`.
    """
    names = list(allowed)
    by_last_part: dict[str, str] = {}
    for name in names:
        by_last_part.setdefault(name.rsplit(".", 1)[-1], name)
    last_part = given.rsplit(".", 1)[-1]
    homes = sum(name.rsplit(".", 1)[-1] == last_part for name in names)
    if homes == 1 or (homes and "." not in given):
        return by_last_part[last_part]
    if close := difflib.get_close_matches(given, names, n=1):
        return close[0]
    close = difflib.get_close_matches(last_part, by_last_part, n=1)
    return by_last_part[close[0]] if close else None


def nearest_words(given: str, allowed: Iterable[str]) -> str:
    """`nearest: NAME; ` for a message, or nothing."""
    match = nearest(given, allowed)
    return f"nearest: {match}; " if match else ""


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """Values of a configuration by dotted path (free dictionaries stay whole)."""
    return {path: functools.reduce(getattr, path.split("."), config) for path in schema_keys()}
