"""Planned stays of users: what they start from, read before the run, and what they leave behind.

A user that leaves gets the folder `users/NAME` of the run: adapters and optimizer state, from which
it can join another run, or the same one again, where it stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cola.attendance import UserState, Visit
from cola.checkpoint import load_state, save_state
from cola.config.schema import UserVisitConfig
from cola.errors import ConfigError, DataError
from cola.roster import Roster
from cola.sites import SiteName
from cola.user_adapters import SiteAdapter, UserAdapters
from cola.user_rows import UserId, user_folder

FOLDER = "users"


def keep_in(run_dir: Path) -> Callable[[UserId, UserState], None]:
    """Writes what users leave with below a run's folder."""

    def keep(user: UserId, state: UserState) -> None:
        folder = run_dir / FOLDER / user_folder(user)
        save_state(
            folder, {"user": user, "sites": {site: dict(own) for site, own in state.items()}}
        )

    return keep


def load_visits(
    schedule: Sequence[UserVisitConfig], adapters: Mapping[SiteName, SiteAdapter], roster: Roster
) -> list[Visit]:
    """The planned stays, with what their users start from.

    Raises:
        ConfigError: a folder holds no user's state, or one of other sites or shapes.
    """
    return [
        Visit(
            user=roster.position(visit.user),
            join=visit.join,
            leave=visit.leave,
            state=None if visit.init is None else _load(visit, visit.init, adapters, roster),
        )
        for visit in schedule
        if visit.user in roster.names  # a user whose rows cannot be read has been left out
    ]


def _load(
    visit: UserVisitConfig, init: str, adapters: Mapping[SiteName, SiteAdapter], roster: Roster
) -> dict[SiteName, dict[str, Any]]:
    try:
        sites: dict[SiteName, dict[str, Any]] = load_state(Path(init))["sites"]
    except (DataError, KeyError) as error:
        raise ConfigError(
            f"users.schedule: user {visit.user}, init={init}: no state of a user ({error}); give "
            "the folder users/NAME of a run that the user left"
        ) from error
    for site, adapter in adapters.items():
        assert isinstance(adapter, UserAdapters)
        stack, place = adapter.stack_of(roster.position(visit.user))
        here = {name: list(tensor.shape) for name, tensor in stack.member_state(place).items()}
        found = sites.get(site, {}).get("adapter", {})
        there = {name: list(tensor.shape) for name, tensor in found.items()}
        if here != there:
            raise ConfigError(
                f"users.schedule: user {visit.user}, init={init}: site {site} has "
                f"{there or 'no adapter'} there and needs {here}; set model, model.sites and the "
                "user's kind and rank as they were when it left"
            )
    if extra := sites.keys() - adapters.keys():
        raise ConfigError(
            f"users.schedule: user {visit.user}, init={init}: sites {sorted(extra)[:3]} have "
            "adapters there and none here; set model.sites as it was when the user left"
        )
    return sites
