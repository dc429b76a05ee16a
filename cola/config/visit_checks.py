"""Checks who takes part when, and who fits elsewhere: `users.schedule` and `users.local`.

Part of `check_users`; no Hydra and no torch.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from cola.config.schema import UsersConfig, UserVisitConfig
from cola.errors import ConfigError

_LOCAL = ("local_dir", "local_seconds", "local_late")
_DEFAULTS = vars(UsersConfig())


def check_schedule(users: UsersConfig, *, needs_folders: bool) -> None:
    """Refuses visits that cannot be made.

    Args:
        users: with their visits.
        needs_folders: what a user starts from has to exist.

    Raises:
        ConfigError: a visit without a step, two at once, or a folder that is missing.
    """
    visits = sorted(users.schedule, key=lambda visit: (visit.user, visit.join))
    for visit in visits:
        if visit.join < 1:
            raise ConfigError(
                f"users.schedule: join={visit.join} of user '{visit.user}': steps count from 1"
            )
        if visit.leave is not None and visit.leave <= visit.join:
            raise ConfigError(
                f"users.schedule: user '{visit.user}' joins at step {visit.join} and leaves at "
                f"{visit.leave}; a visit is at least one step long"
            )
        if needs_folders and visit.init is not None and not Path(visit.init).is_dir():
            raise ConfigError(
                f"users.schedule: init={visit.init} of user '{visit.user}': there is no such "
                "folder; give the user's folder of adapters that a run left"
            )
    for one, other in itertools.pairwise(visits):
        _check_apart(one, other)


def _check_apart(one: UserVisitConfig, other: UserVisitConfig) -> None:
    if one.user == other.user and (one.leave is None or one.leave > other.join):
        raise ConfigError(
            f"users.schedule: user '{one.user}' joins at step {other.join}, but is there from step "
            f"{one.join} {'on' if one.leave is None else f'until step {one.leave}'}; let one visit "
            "end before the next"
        )


def check_local(users: UsersConfig) -> None:
    """Refuses settings that a user's own process would not read, and those without such users.

    Raises:
        ConfigError: what was given, what to change.
    """
    if not users.local:
        for key in _LOCAL:
            if getattr(users, key) != _DEFAULTS[key]:
                raise ConfigError(
                    f"users.{key} would have no effect without users.local; name there the users "
                    "who fit in processes of their own, or leave it out"
                )
        return
    if twice := repeated_name(users.local):
        raise ConfigError(f"users.local names '{twice}' twice; name every user once")
    for entry in users.adapters:
        for key in ("lr", "optimizer"):
            if entry.user in users.local and getattr(entry, key) is not None:
                raise ConfigError(
                    f"users.adapters: {key} of user '{entry.user}' would have no effect: the "
                    "user's own process (users.local) decides; leave it out"
                )


def repeated_name(names: Sequence[str]) -> str | None:
    """The first name that comes twice, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
