"""What every user trains: kind, rank, alpha, rate and optimizer, from `users` and `adapter`.

Adapters of one kind and optimizer are fitted together, hence users of one such cohort stand next to
one another in the order in which a run keeps them. No torch here: a mistake must answer at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cola.config.choices import AdapterKind, OptimizerName
from cola.config.keys import nearest_words
from cola.config.schema import ExperimentConfig, UserAdapterConfig, UsersConfig
from cola.errors import ConfigError

_SHOWN_NAMES = 10


@dataclass(frozen=True, kw_only=True)
class UserSettings:
    """One user's adapters and how they are fitted.

    Attributes:
        name: of the user.
        kind: structure of the adapters; new heads are linear whatever it is.
        rank: R, of low-rank adapters.
        hidden: widths of MLP adapters.
        alpha: scale of the output.
        rate: factor on the run's learning rate.
        optimizer: of the adapters.
        is_local: fits in a process of its own.
    """

    name: str
    kind: AdapterKind
    rank: int
    hidden: tuple[int, ...]
    alpha: float
    rate: float
    optimizer: OptimizerName
    is_local: bool

    @property
    def cohort(self) -> tuple[AdapterKind, tuple[int, ...], OptimizerName | None]:
        """Equal for users who are fitted together: one structure (but for ranks), one optimizer.

        Users who fit elsewhere have none here.
        """
        widths = self.hidden if self.kind is AdapterKind.mlp else ()
        return self.kind, widths, None if self.is_local else self.optimizer


def resolve_users(config: ExperimentConfig, names: Sequence[str]) -> tuple[UserSettings, ...]:
    """The settings of every user, in the run's order: users of one cohort are neighbours.

    Asked once, with all users in the data's order: kinds of parts go by place, and in the run's
    order places are others. `TaskData.user_settings` keeps the answer.

    Args:
        config: valid, defaults resolved.
        names: of all users, in the data's order.

    Returns:
        K settings; cohorts in the order of their first users.

    Raises:
        ConfigError: a setting names a user that does not exist, or does not fit the user's kind.
    """
    users, adapter, peak = config.users, config.adapter, config.optimizer.lr
    assert peak is not None, "defaults are resolved before users are"
    for name in names:
        check_name(name)
    check_known(users, names)
    kinds = kinds_by_user(config, names)
    own = {entry.user: entry for entry in users.adapters}
    settings = []
    for name, kind in kinds.items():
        entry = own.get(name, UserAdapterConfig(user=name))
        hidden = adapter.hidden if entry.hidden is None else entry.hidden
        settings.append(
            UserSettings(
                name=name,
                kind=kind,
                rank=adapter.rank if entry.rank is None else entry.rank,
                hidden=tuple(hidden),
                alpha=adapter.alpha if entry.alpha is None else entry.alpha,
                rate=1.0 if entry.lr is None else entry.lr / peak,
                optimizer=config.optimizer.name if entry.optimizer is None else entry.optimizer,
                is_local=name in users.local,
            )
        )
    first: dict[object, int] = {}
    for user in settings:
        first.setdefault(user.cohort, len(first))
    return tuple(sorted(settings, key=lambda user: first[user.cohort]))


def expand_kinds(kinds: Sequence[str]) -> list[AdapterKind]:
    """Adapter kinds of the users' parts, in order; `lowrank-linear` is the paper's way to name two.

    Raises:
        ConfigError: no such kind.
    """
    allowed = AdapterKind.__members__
    parts = [part for words in kinds for part in words.split("-")]
    for part in parts:
        if part not in allowed:
            raise ConfigError(
                f"users.kinds=[{','.join(kinds)}]: no kind '{part}'; {nearest_words(part, allowed)}"
                f"allowed: {', '.join(allowed)}, and several as in lowrank-linear or "
                "[lowrank,linear]"
            )
    return [allowed[part] for part in parts]


def kinds_by_user(config: ExperimentConfig, names: Sequence[str]) -> dict[str, AdapterKind]:
    """Every user's adapter kind: of `users.adapters`, else of its part, else the run's.

    Args:
        config: of the run.
        names: of all users, in the data's order.

    Returns:
        Kinds in the order of `names`.

    Raises:
        ConfigError: more kinds than users, or a setting that the user's kind does not have.
    """
    users = config.users
    kinds = expand_kinds(users.kinds) if users.kinds else [config.adapter.kind]
    if len(kinds) > max(len(names), 1):
        raise ConfigError(
            f"users.kinds=[{','.join(users.kinds or ())}] gives {len(kinds)} kinds to "
            f"{len(names)} users; give at most one kind for each"
        )
    own = {entry.user: entry for entry in users.adapters}
    found = {}
    for index, name in enumerate(names):
        dealt = kinds[index * len(kinds) // len(names)]  # contiguous parts, as equal as possible
        entry = own.get(name)
        found[name] = dealt if entry is None or entry.kind is None else entry.kind
        if entry is not None:
            check_fits(entry, found[name])
    return found


def lowrank_sizes(config: ExperimentConfig) -> dict[str, int]:
    """Ranks that low-rank adapters of the run may have, by what sets them."""
    users, adapter = config.users, config.adapter
    dealt = expand_kinds(users.kinds) if users.kinds else [adapter.kind]
    takes_default = any(e.kind is AdapterKind.lowrank and e.rank is None for e in users.adapters)
    is_dealt = AdapterKind.lowrank in dealt
    sizes = {"adapter.rank": adapter.rank} if is_dealt or takes_default else {}
    return sizes | {
        f"rank of user '{entry.user}' (users.adapters)": entry.rank
        for entry in users.adapters
        if entry.rank is not None
    }


def check_fits(entry: UserAdapterConfig, kind: AdapterKind) -> None:
    """Refuses a size that adapters of the user's kind do not have.

    Raises:
        ConfigError: `rank` or `hidden` would have no effect.
    """
    for key, owner in (("rank", AdapterKind.lowrank), ("hidden", AdapterKind.mlp)):
        if getattr(entry, key) is not None and kind is not owner:
            raise ConfigError(
                f"users.adapters: {key} of user '{entry.user}' would have no effect with its "
                f"{kind.name} adapters; leave it out or give the user kind: {owner.name}"
            )


def check_known(users: UsersConfig, known: Sequence[str]) -> None:
    """Refuses settings of users that do not exist.

    Args:
        users: names them.
        known: names of all users.

    Raises:
        ConfigError: `users.adapters`, `users.schedule` or `users.local` names another one.
    """
    allowed = dict.fromkeys(known)
    named = {
        "adapters": [entry.user for entry in users.adapters],
        "schedule": [visit.user for visit in users.schedule],
        "local": users.local,
    }
    for key, names in named.items():
        for name in names:
            if name not in allowed:
                raise ConfigError(
                    f"users.{key}: no user '{name}'; {nearest_words(name, allowed)}"
                    f"allowed: {list_names(list(allowed))}"
                )


def check_name(name: str) -> None:
    """Refuses what cannot name a user, or the folder of a user's adapters.

    Raises:
        ConfigError: blank, `.` or `..`.
    """
    if not name.strip() or name in (".", ".."):
        raise ConfigError(f"users: '{name}' cannot be a user's name; give the user another one")


def list_names(names: Sequence[str]) -> str:
    """The first names, and how many there are if those are not all."""
    more = "" if len(names) <= _SHOWN_NAMES else f", ... ({len(names)} in all)"
    return ", ".join(names[:_SHOWN_NAMES]) + more
