"""The fit of many users' adapters: batched where they are alike, each with a step of its own.

A user without rows in an interval does not step. A user whose gradient is not finite does not step
either, and is reported to the roster; nobody else notices.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cola.adaptation_data import AdaptationData
from cola.config.choices import ClipMode
from cola.config.schema import OptimizerConfig
from cola.offload.broken_users import BrokenUsers
from cola.offload.cohort_fitter import CohortFitter, step_cohorts
from cola.offload.fit import Fit
from cola.offload.local_users import LocalUsers
from cola.optimizers import rate_factor
from cola.roster import Roster
from cola.runtime import product_dtype
from cola.sites import SiteName
from cola.user_adapters import UserAdapters, require_rows
from cola.user_gradients import shared_gradients, user_gradients
from cola.user_optimizers import UserOptimizer
from cola.user_rows import UserRows
from cola.user_stack import UserStack


class UserFitter:
    """Owns the adapters of all users at some sites, their gradients and optimizer states.

    Attributes:
        adapters: by site.
        held_bytes: by owner, as of the last step.
    """

    def __init__(
        self,
        adapters: Mapping[SiteName, UserAdapters],
        optimizer: OptimizerConfig,
        roster: Roster,
        *,
        shares_rows: bool = False,
        local: LocalUsers | None = None,
    ) -> None:
        """Takes over the adapters.

        Args:
            adapters: by site.
            optimizer: of the run.
            roster: of the run.
            shares_rows: all rows teach every user (users.gradient=exact).
            local: takes the data of users who fit in processes of their own, and answers; None
                where nobody is trained, or nobody fits elsewhere.
        """
        self.adapters = dict(adapters)
        self._roster = roster
        self._shares_rows = shares_rows
        self._local = local
        self._cohorts = {
            site: [self._cohort(stack, optimizer) for stack in own.stacks]
            for site, own in self.adapters.items()
        }
        first = next(iter(next(iter(self.adapters.values())).parameters()))
        self._dtype, self.device = first.dtype, first.device
        self._broken = BrokenUsers(roster)
        self.held_bytes: dict[str, int] = {}
        self._note_held()

    def can_prepare(self, site: SiteName) -> bool:
        """No: whose rows are whose is told with the hidden gradients."""
        return False

    def prepare(self, inputs: Sequence[tuple[SiteName, Tensor]]) -> None:
        """Nothing."""

    def accumulate(self, batch: Sequence[tuple[SiteName, AdaptationData]]) -> None:
        """Adds the gradients of one batch; the parameters are constant inside an interval."""
        together: dict[int, list[tuple[SiteName, AdaptationData]]] = {}
        for site, data in batch:  # sites with one input come with one tensor
            together.setdefault(id(data.hidden_input), []).append((site, data))
        for calls in together.values():
            self._accumulate(calls)

    def gradient_norm(self, site: SiteName, fit: Fit) -> Tensor:
        """(K,) norm of each user's gradient of the interval at one site."""
        return torch.cat([c.norms() * c.scales(fit) for c in self._cohorts[site]])

    def step(self, fit: Fit, clip_factor: float | Tensor = 1.0) -> list[SiteName]:
        """Steps every user that has data, installs what came back, and empties the gradients.

        Args:
            fit: rate and scale of this adaptation.
            clip_factor: factor of a clip across sites, (K,).

        Returns:
            Sites where somebody stepped, here or elsewhere.
        """
        stepped: set[SiteName] = set()
        for cohorts in zip(*self._cohorts.values(), strict=True):  # one users' at every site
            sites = [s for s, c in zip(self._cohorts, cohorts, strict=True) if c.taught]
            taught = [cohort for cohort in cohorts if cohort.taught]
            if not taught:
                continue
            first, last = taught[0].stack.first, taught[0].stack.last
            own = clip_factor[first:last] if isinstance(clip_factor, Tensor) else clip_factor
            self._broken.note(sites, first, step_cohorts(taught, fit, own))
            stepped.update(sites)
        if self.device.type == "cpu":
            self.check_finite(fit.number)
        self._note_held()
        stepped.update(self._install_answers(fit.number))
        return [site for site in self._cohorts if site in stepped]

    def check_finite(self, number: int) -> None:
        """Reports users whose gradients were not finite up to this adaptation.

        A GPU is asked here, at evaluations and checkpoints, since asking at every step would
        synchronise it.
        """
        self._broken.report(number)

    def state_dict(self, site: SiteName) -> dict[str, Any]:
        """Adapters, optimizer states and the gradients of an interval in progress."""
        return {
            "cohorts": [cohort.state_dict() for cohort in self._cohorts[site]],
            "local": {} if self._local is None else self._local.state_dict(site),
        }

    def load_state_dict(self, states: Mapping[SiteName, Mapping[str, Any]]) -> None:
        """Continues from `state_dict` of every site."""
        for site, cohorts in self._cohorts.items():
            for cohort, state in zip(cohorts, states[site]["cohorts"], strict=True):
                cohort.load_state_dict(state)
            if self._local is not None:
                self._local.load_state_dict(site, states[site]["local"])
        self._note_held()

    def user_state(self, site: SiteName, user: int) -> dict[str, Any]:
        """One user's adapter and optimizer state at a site, to leave with."""
        cohort, place = self._cohort_of(site, user)
        return cohort.user_state(place)

    def load_user_state(self, site: SiteName, user: int, state: Mapping[str, Any]) -> None:
        """Gives one user what it left with; without an optimizer state, a fresh one."""
        cohort, place = self._cohort_of(site, user)
        cohort.load_user_state(place, state)

    def forget_interval(self, user: int) -> None:
        """Drops a user's gradients of the interval in progress: it takes no part any more."""
        for site in self._cohorts:
            cohort, place = self._cohort_of(site, user)
            cohort.forget(place)

    def _accumulate(self, calls: Sequence[tuple[SiteName, AdaptationData]]) -> None:
        """Adds what calls with one hidden input teach."""
        first_site, first = calls[0]
        dtype = product_dtype(first.hidden_input, self._dtype)
        x = first.hidden_input.to(dtype)
        rows = require_rows(first.rows, len(x), first_site)
        sites = [site for site, _ in calls]
        gradients = [data.hidden_gradient.to(dtype) for _, data in calls]
        if self._shares_rows:
            for site, g in zip(sites, gradients, strict=True):
                data = AdaptationData(hidden_input=x, hidden_gradient=g)
                self._teach_everyone(site, self._finite(site, data, rows))
            return
        for cohorts in zip(*(self._cohorts[site] for site in sites), strict=True):
            stacks = [cohort.stack for cohort in cohorts]
            where, own_rows = rows.part(stacks[0].first, stacks[0].last)
            if not own_rows.users:
                continue
            own_x, own_g = x[where], [g[where] for g in gradients]
            if cohorts[0].is_local and self._local is not None:
                for site, g in zip(sites, own_g, strict=True):
                    data = AdaptationData(hidden_input=own_x, hidden_gradient=g)
                    self._local.take(site, data.to(self._dtype), own_rows, stacks[0].first)
                continue
            found = user_gradients(stacks, own_x, own_g, own_rows)
            for cohort, one in zip(cohorts, found, strict=True):
                cohort.add(one, own_rows.users)

    def _teach_everyone(self, site: SiteName, data: AdaptationData) -> None:
        shares = self._roster.shares()
        for cohort in self._cohorts[site]:
            first, last = cohort.stack.first, cohort.stack.last
            present = [user - first for user in self._roster.present if first <= user < last]
            cohort.add(shared_gradients(cohort.stack, data, shares[first:last]), present)

    def _finite(self, site: SiteName, data: AdaptationData, rows: UserRows) -> AdaptationData:
        """The data with zeros for rows that are not finite, whose users are noted.

        Where all rows teach everyone, such a row would spoil everyone.
        """
        x, g = data.hidden_input, data.hidden_gradient
        is_finite = x.flatten(1).isfinite().all(dim=1) & g.flatten(1).isfinite().all(dim=1)  # (N,)
        for user, where in rows.slices():
            self._broken.note([site], user, ~is_finite[where].all().view(1, 1))
        shape = (-1, *[1] * (x.dim() - 1))
        return AdaptationData(
            hidden_input=x.masked_fill(~is_finite.view(shape), 0.0),
            hidden_gradient=g.masked_fill(~is_finite.view(shape), 0.0),
        )

    def _cohort_of(self, site: SiteName, user: int) -> tuple[CohortFitter, int]:
        cohorts = self._cohorts[site]
        cohort = next(c for c in cohorts if c.stack.first <= user < c.stack.last)
        return cohort, user - cohort.stack.first

    def _install_answers(self, number: int) -> list[SiteName]:
        """Parameters from users' own processes; the sites that have any."""
        answers = {} if self._local is None else self._local.collect(number)
        for user, sites in answers.items():
            for site in self._cohorts:
                self.load_user_state(site, user, {"adapter": sites[site]})
        return list(self._cohorts) if answers else []

    def _cohort(self, stack: UserStack, config: OptimizerConfig) -> CohortFitter:
        users = self._roster.settings[stack.first : stack.last]
        clip_norm = config.clip_norm if config.clip is ClipMode["adapter"] else None
        if users[0].is_local:  # so are all of a cohort
            return CohortFitter(stack, None, clip_norm=clip_norm)
        factor = rate_factor(config, is_head=stack.adapter.spec.is_head)
        optimizer = UserOptimizer(
            stack.parameter_stacks(),
            config,
            name=users[0].optimizer,
            rates=[factor * user.rate for user in users],
        )
        return CohortFitter(stack, optimizer, clip_norm=clip_norm)

    def _note_held(self) -> None:
        """Bytes by owner: numbers, since others may ask while this worker changes the tensors."""
        held: Counter[str] = Counter()
        for cohorts in self._cohorts.values():
            for cohort in cohorts:
                held.update(cohort.held_bytes())
        self.held_bytes = dict(held)
