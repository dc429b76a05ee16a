"""Which adapters a run has, by shape and number: what `dry_run` counts, without any values.

Users whose adapters have one shape are counted, not built one by one.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cola.adapters import Adapter, build_adapter
from cola.config.choices import OptimizerName
from cola.config.schema import AdapterConfig, ExperimentConfig
from cola.config.user_settings import UserSettings, resolve_users
from cola.errors import ConfigError
from cola.sites import SiteName, SiteSpec

Sites = Mapping[SiteName, SiteSpec]

MOMENTS = {OptimizerName.adamw: 2, OptimizerName.sgd: 1}
"""Values that an optimizer keeps of every parameter."""


@dataclass(frozen=True, kw_only=True)
class PlannedCohort:
    """Users whose adapters are stacked.

    Attributes:
        num_users: K of the cohort.
        adapters: of one user by site, on the meta device, with the cohort's largest rank.
        optimizer: of all of them; None if they fit in processes of their own.
    """

    num_users: int
    adapters: Mapping[SiteName, Adapter]
    optimizer: OptimizerName | None

    @property
    def num_stacked(self) -> int:
        """Parameters of the stacks, in which smaller ranks are filled up to the largest."""
        return self.num_users * _count(self.adapters)

    def num_stacked_at(self, site: SiteName) -> int:
        """Of one site."""
        return self.num_users * sum(p.numel() for p in self.adapters[site].parameters())


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """The adapters of all users.

    Attributes:
        cohorts: in the run's order; one of one user where users have no adapters of their own.
        num_trained: parameters of all adapters, each of its own rank.
    """

    cohorts: Sequence[PlannedCohort]
    num_trained: int

    @property
    def num_users(self) -> int:
        """K; 1 where one set of adapters is for everyone."""
        return sum(cohort.num_users for cohort in self.cohorts)

    @property
    def num_stacked(self) -> int:
        """Parameters of all stacks, wherever they lie."""
        return sum(cohort.num_stacked for cohort in self.cohorts)

    @property
    def num_fitted(self) -> int:
        """Parameters of the stacks that are fitted here."""
        return sum(cohort.num_stacked for cohort in self.cohorts if cohort.optimizer)

    @property
    def num_moments(self) -> int:
        """Values that the optimizers of those keep."""
        fitted = ((cohort.optimizer, cohort.num_stacked) for cohort in self.cohorts)
        return sum(MOMENTS[optimizer] * num for optimizer, num in fitted if optimizer)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of one user of every cohort."""
        adapters = (adapter for cohort in self.cohorts for adapter in cohort.adapters.values())
        return itertools.chain.from_iterable(adapter.parameters() for adapter in adapters)

    def num_parameters(self, site: SiteName) -> int:
        """Of the stacks at one site."""
        return sum(cohort.num_stacked_at(site) for cohort in self.cohorts)

    def num_fitted_at(self, site: SiteName) -> int:
        """Of those stacks at one site that are fitted here."""
        return sum(cohort.num_stacked_at(site) for cohort in self.cohorts if cohort.optimizer)

    def output(self, site: SiteName, x: Tensor) -> Tensor:
        """g(x) of a batch (B, ...) in which every cohort has its users' share of the rows."""
        ends = itertools.accumulate(cohort.num_users for cohort in self.cohorts)
        bounds = [len(x) * end // self.num_users for end in ends]
        outputs = [
            cohort.adapters[site].to(x.dtype)(rows)
            for cohort, rows in zip(self.cohorts, x.tensor_split(bounds[:-1]), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def plan_adapters(
    config: ExperimentConfig, sites: Sites, users: Sequence[UserSettings] = ()
) -> AdapterPlan:
    """The adapters that a configuration means for the sites of a base model.

    Args:
        config: of the run.
        sites: to adapt.
        users: with adapters of their own, as the data has them; none: as far as they are known
            without.

    Raises:
        ConfigError: it does not say how many users there are, or who.
    """
    if not config.users.name.owns_adapters:
        adapters = _build(config.adapter, sites)
        everyone = PlannedCohort(num_users=1, adapters=adapters, optimizer=config.optimizer.name)
        return AdapterPlan(cohorts=[everyone], num_trained=_count(adapters))
    users = users or resolve_users(config, _user_names(config))
    one_of_each = {_shape(user): user for user in users}
    built = {shape: _build(_config_of(user), sites) for shape, user in one_of_each.items()}
    sizes = {shape: _count(adapters) for shape, adapters in built.items()}
    cohorts = []
    for _, group in itertools.groupby(users, key=lambda user: user.cohort):
        members = list(group)
        widest = max(members, key=lambda user: user.rank)
        cohorts.append(
            PlannedCohort(
                num_users=len(members),
                adapters=built[_shape(widest)],
                optimizer=None if widest.is_local else widest.optimizer,
            )
        )
    return AdapterPlan(cohorts=cohorts, num_trained=sum(sizes[_shape(user)] for user in users))


def _user_names(config: ExperimentConfig) -> list[str]:
    """Users as far as they are known without data."""
    users = config.users
    if users.names is not None:
        return users.names
    if users.num is None:
        raise ConfigError(
            f"dry_run=true with users={users.name.name}: it reads no data, so how many users there "
            "are is not known; set users.num or users.names"
        )
    names = [f"user{number + 1}" for number in range(users.num)]  # as shards of a set are called
    single = [entry.user for entry in users.adapters] + [visit.user for visit in users.schedule]
    if unknown := {*single, *users.local}.difference(names):
        raise ConfigError(
            f"dry_run=true with settings of user '{min(unknown)}': it reads no data, so which "
            "users there are is not known; set users.names"
        )
    return names


def _shape(user: UserSettings) -> tuple[object, ...]:
    return user.kind, user.rank, user.hidden


def _config_of(user: UserSettings) -> AdapterConfig:
    return AdapterConfig(kind=user.kind, rank=user.rank, hidden=list(user.hidden))


def _build(config: AdapterConfig, sites: Sites) -> dict[SiteName, Adapter]:
    with torch.device("meta"):
        return {name: build_adapter(config, spec, seed=0) for name, spec in sites.items()}


def _count(adapters: Mapping[SiteName, Adapter]) -> int:
    return sum(p.numel() for adapter in adapters.values() for p in adapter.parameters())
