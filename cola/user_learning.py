"""Users who have adapters of their own, from the configuration: who they are and how they learn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cola.attendance import UserState, Visit
from cola.config.choices import UserGradient, UserLoss
from cola.config.schema import ExperimentConfig
from cola.config.user_settings import UserSettings
from cola.offload.local_users import LocalUsers
from cola.roster import Roster
from cola.sites import SiteName, SiteSpec
from cola.user_adapters import UserAdapters, build_user_adapters
from cola.user_rows import UserId
from cola.user_visits import load_visits


@dataclass(frozen=True, kw_only=True)
class UserLearning:
    """How users learn side by side.

    Attributes:
        roster: all of them.
        gradient: which rows teach a user.
        loss: what a user's rows are averaged over.
        visits: of users that come or go.
        keep: takes what a user leaves with.
        local: users that fit in processes of their own; None: nobody does.
    """

    roster: Roster
    gradient: UserGradient = UserGradient.federated
    loss: UserLoss = UserLoss.batch
    visits: Sequence[Visit] = ()
    keep: Callable[[UserId, UserState], None] = lambda user, state: None
    local: LocalUsers | None = None


def build_users(
    config: ExperimentConfig, sites: Mapping[SiteName, SiteSpec], users: Sequence[UserSettings]
) -> tuple[UserLearning, dict[SiteName, UserAdapters]]:
    """Users and their fresh adapters, all of them present."""
    roster = Roster(users, reduction=config.users.reduce)
    adapters = {
        name: build_user_adapters(spec, roster, seed=config.seed) for name, spec in sites.items()
    }
    learning = UserLearning(roster=roster, gradient=config.users.gradient, loss=config.users.loss)
    return learning, adapters


def with_plans(
    learning: UserLearning,
    config: ExperimentConfig,
    adapters: Mapping[SiteName, UserAdapters],
    *,
    keep: Callable[[UserId, UserState], None],
    local_dir: Path | None,
) -> UserLearning:
    """The users of a run: some come and go, some fit elsewhere.

    Args:
        learning: from `build_users`.
        config: says who.
        adapters: of all users.
        keep: takes what a user leaves with.
        local_dir: where users' own processes are met; None: they are not, as in an evaluation.

    Raises:
        ConfigError: what a user should start from cannot be read, or does not fit.
    """
    users = config.users
    local = None
    if users.local and local_dir is not None:
        local = LocalUsers(
            local_dir,
            adapters,
            learning.roster,
            optimizer=config.optimizer,
            seconds=users.local_seconds,
            late=users.local_late,
        )
    visits = load_visits(users.schedule, adapters, learning.roster)
    return replace(learning, visits=visits, keep=keep, local=local)
