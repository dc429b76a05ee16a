"""Checks of `users`: settings that the mode does not have, and users who cannot be as they are set.

Part of `validate`: everything that can be known before data is read. No Hydra and no torch.
"""

from collections.abc import Collection

from cola.config.choices import (
    AdapterKind,
    MergeMode,
    UserGradient,
    UserLoss,
    UsersMode,
)
from cola.config.keys import word
from cola.config.ranges import COUNT, POSITIVE, RANGES
from cola.config.schema import ExperimentConfig, UsersConfig
from cola.config.user_settings import (
    check_fits,
    check_known,
    check_name,
    expand_kinds,
    kinds_by_user,
    list_names,
)
from cola.config.visit_checks import check_local, check_schedule, repeated_name
from cola.errors import ConfigError

SEVERAL_USERS = ("num", "column", "names", "others")
"""Keys that need users, who are at least scored apart; the others need adapters of their own."""

_ENTRY_RANGES = {
    "rank": COUNT,
    "hidden": RANGES["adapter.hidden"],
    "alpha": POSITIVE,
    "lr": POSITIVE,
}
_DEFAULTS = vars(UsersConfig())


def check_users(config: ExperimentConfig, given: Collection[str]) -> None:
    """Refuses settings of users that cannot be used, and those that nothing would read.

    Args:
        config: of the right types and ranges.
        given: groups and keys set explicitly.

    Raises:
        ConfigError: what was given, what is allowed, what to change.
    """
    users = config.users
    _check_effect(users)
    _check_names(users)
    if not users.name.owns_adapters:
        return
    _check_mode(config, given)
    _check_gradient(users)
    _check_entries(users)
    _check_kinds(config, given)
    _check_mergeable(config)
    check_schedule(users, needs_folders=not config.dry_run)
    check_local(users)
    if users.names is not None:
        check_known(users, users.names)


def _check_effect(users: UsersConfig) -> None:
    mode = users.name
    for key, default in _DEFAULTS.items():
        if key == "name" or getattr(users, key) == default:
            continue
        if mode is UsersMode.one and key in SEVERAL_USERS:
            raise ConfigError(
                f"users.{key} would have no effect with users=one; use users=joint, alone or "
                "collaboration, or leave it out"
            )
        if not mode.owns_adapters and key not in SEVERAL_USERS:
            raise ConfigError(
                f"users.{key} would have no effect with users={mode.name}, where users have no "
                "adapters of their own; use users=alone or collaboration, or leave it out"
            )


def _check_names(users: UsersConfig) -> None:
    if users.names is None:
        return
    for name in users.names:
        check_name(name)
    if twice := repeated_name(users.names):
        raise ConfigError(f"users.names: two users of one name '{twice}'; name every user once")
    if not users.names:
        raise ConfigError("users.names=[]: names no user; leave it out to have those of the data")
    if users.num not in (None, len(users.names)):
        raise ConfigError(
            f"users.num={users.num} with {len(users.names)} users in users.names; leave users.num "
            "out"
        )


def _check_mode(config: ExperimentConfig, given: Collection[str]) -> None:
    mode, merge = config.users.name, config.merge.mode
    if mode is UsersMode.alone and merge is MergeMode.merged:
        raise ConfigError(
            "merge=merged with users=alone: users who learn alone are never merged in training; "
            "use merge=unmerged (evaluation.merge=both tries the merge at the end), or "
            "users=collaboration"
        )
    if mode is UsersMode.collaboration and merge is not MergeMode.merged:
        raise ConfigError(
            f"merge={merge.name} with users=collaboration: every row sees the merged adapters of "
            "all users; use merge=merged, or users=alone"
        )
    if "users.reduce" in given and mode is UsersMode.alone and not config.evaluation.merge.merges:
        raise ConfigError(
            f"users.reduce={word(config.users.reduce)} would have no effect with users=alone, "
            "which merges nothing; use evaluation.merge=both or merged, users=collaboration, or "
            "leave it out"
        )
    if config.adapter.init is not None:
        raise ConfigError(
            f"adapter.init={config.adapter.init} with users={mode.name}: it starts one set of "
            "adapters, and every user has one; give users.schedule=[{user:NAME,init:FOLDER}], or "
            "use users=one or joint"
        )


def _check_gradient(users: UsersConfig) -> None:
    if users.gradient is not UserGradient.exact:
        return
    if users.name is not UsersMode.collaboration:
        raise ConfigError(
            f"users.gradient=exact would have no effect with users={users.name.name}, where a "
            "user's adapters meet no other rows; use users=collaboration or leave it out"
        )
    if users.loss is UserLoss.per_user:
        raise ConfigError(
            "users.gradient=exact with users.loss=per_user: the exact gradient is that of one loss "
            "over all rows; use users.loss=batch, or users.gradient=federated"
        )
    if users.local:
        raise ConfigError(
            "users.gradient=exact with users.local: a user's own process would need the rows of "
            "all users; use users.gradient=federated, or leave users.local out"
        )


def _check_entries(users: UsersConfig) -> None:
    if twice := repeated_name([entry.user for entry in users.adapters]):
        raise ConfigError(f"users.adapters: two entries of user '{twice}'; write one")
    for entry in users.adapters:
        for key, allowed in _ENTRY_RANGES.items():
            value = getattr(entry, key)
            if value is not None and not allowed.contains(value):
                raise ConfigError(
                    f"users.adapters: {key}={word(value)} of user '{entry.user}': wrong value; "
                    f"allowed: {allowed.words}"
                )


def _check_kinds(config: ExperimentConfig, given: Collection[str]) -> None:
    users = config.users
    kinds = [] if users.kinds is None else _dealt_kinds(config, given)
    if users.names is not None:
        kinds_by_user(config, users.names)
    elif users.num is not None and len(kinds) > users.num:
        raise ConfigError(
            f"users.kinds={word(users.kinds)} gives {len(kinds)} kinds to {users.num} users; give "
            "at most one kind for each"
        )
    elif users.kinds is None:
        for entry in users.adapters:
            check_fits(entry, config.adapter.kind if entry.kind is None else entry.kind)


def _dealt_kinds(config: ExperimentConfig, given: Collection[str]) -> list[AdapterKind]:
    """Kinds of the users' parts, which are several and stand in for the run's one kind."""
    words = f"users.kinds={word(config.users.kinds)}"
    kinds = expand_kinds(config.users.kinds or ())
    if len(set(kinds)) < 2:
        raise ConfigError(
            f"{words}: kinds of the users' parts, at least two different ones; to give all users "
            "one kind, write adapter=KIND"
        )
    if explicit := {"adapter", "adapter.kind"}.intersection(given):
        raise ConfigError(
            f"{max(explicit)}={config.adapter.kind.name} would have no effect with {words}, which "
            "gives every user a kind; leave one of them out"
        )
    return kinds


def _check_mergeable(config: ExperimentConfig) -> None:
    """Refuses MLP adapters where they would be merged, in training or for evaluation."""
    if config.merge.mode is MergeMode.merged:
        given, remedy = "merge=merged", "use users=alone"
    elif config.evaluation.merge.merges:
        given = f"evaluation.merge={config.evaluation.merge.name}"
        remedy = "use evaluation.merge=unmerged"
    else:
        return
    if owners := _mlp_owners(config):
        raise ConfigError(
            f"{given} with mlp adapters of {owners}: only an adapter that is linear in its input "
            f"can be merged (Proposition 2); give them lowrank or linear ones, or {remedy}"
        )


def _mlp_owners(config: ExperimentConfig) -> str:
    """Who has MLP adapters, in words; empty if nobody."""
    users = config.users
    if users.names is not None:
        kinds = kinds_by_user(config, users.names)
        return list_names([name for name, kind in kinds.items() if kind is AdapterKind.mlp])
    dealt = expand_kinds(users.kinds) if users.kinds else [config.adapter.kind]
    if AdapterKind.mlp in dealt:
        return f"users.kinds={word(users.kinds)}" if users.kinds else "adapter=mlp"
    return list_names([one.user for one in users.adapters if one.kind is AdapterKind.mlp])
