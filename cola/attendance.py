"""Users that come and go: at steps that were planned, or because they cannot go on.

A user that takes no part has no rows in a batch, no step, and no share in a merge; its adapters and
its optimizer stay as they are. What a user leaves with goes to whoever keeps it, and is what it may
come back with. A user whose own process is late pauses, and comes back with what that answers.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cola.errors import OffloadError
from cola.offload.local_users import LocalUsers
from cola.offload.user_fitter import UserFitter
from cola.roster import Roster
from cola.sites import SiteName
from cola.user_rows import UserId

logger = logging.getLogger(__name__)

UserState = Mapping[SiteName, Mapping[str, Any]]
"""Adapter and optimizer state of one user at every site."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A planned stay.

    Attributes:
        user: position.
        join: first step with the user's rows, from 1.
        leave: first step without them; None: stays.
        state: what the adapters start from; None: what they are.
    """

    user: int
    join: int = 1
    leave: int | None = None
    state: UserState | None = None


class Attendance:
    """Who takes part at which step.

    Attributes:
        roster: the users.
    """

    def __init__(
        self,
        roster: Roster,
        fitters: Sequence[UserFitter],
        visits: Sequence[Visit] = (),
        *,
        keep: Callable[[UserId, UserState], None] = lambda user, state: None,
        local: LocalUsers | None = None,
    ) -> None:
        """Users without a visit stay from the first to the last step.

        Args:
            roster: of the run.
            fitters: own the users' adapters.
            visits: planned.
            keep: takes what a user leaves with.
            local: users who fit in processes of their own.
        """
        self.roster = roster
        self._fitters = fitters
        self._visits = tuple(visits)
        self._keep = keep
        self._local = local
        self._stopped: dict[int, str] = {}
        self._turns = {v.join for v in visits} | {v.leave for v in visits if v.leave is not None}
        self._gone = self._gone_at(1)
        roster.set_absent(self._gone)

    @property
    def has_news(self) -> bool:
        """Whether somebody had to stop, has become late, or can come back."""
        if self.roster.has_stopped or self._local is None:
            return self.roster.has_stopped
        return not self._local.late <= self.roster.absent or self._local.has_answers

    def is_due(self, step: int) -> bool:
        """Whether somebody comes or goes before this step; asked at every step."""
        return step in self._turns or self.has_news

    def change(self, step: int, *, begins: bool) -> None:
        """Lets users come and go; nothing may be under way.

        Args:
            step: that is about to be recorded, or was recorded last.
            begins: the former; planned users join then.

        Raises:
            OffloadError: no user is left.
        """
        for user, why in self.roster.take_stopped().items():
            self._stop(user, why)
        if self._local is not None:
            self._hear(self._local, step)
        before, now = self._gone, self._gone_at(step)
        for user in sorted(now - before):
            for fitter in self._fitters:
                fitter.forget_interval(user)
            if self._local is not None:
                self._local.forget(user)
            self._keep(self.roster.names[user], self._state(user))
            logger.info("step %d: user %s leaves", step, self.roster.names[user])
        for visit in self._visits:
            if begins and visit.join == step and visit.user not in self._stopped:
                if visit.state is not None:
                    self._load(visit.user, visit.state)
                logger.info("step %d: user %s joins", step, self.roster.names[visit.user])
        self._gone = now
        late = frozenset() if self._local is None else self._local.late
        self.roster.set_absent(now | late)
        missing = self._stopped | dict.fromkeys(late, "its own process does not answer")
        if not self.roster.present and missing and not self._is_expected(step):
            reasons = "; ".join(f"{self.roster.names[u]}: {why}" for u, why in missing.items())
            raise OffloadError(f"no user is left at step {step} ({reasons})")

    def state_dict(self) -> dict[str, Any]:
        """Who had to stop."""
        return {"stopped": {str(user): why for user, why in self._stopped.items()}}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continues after a step; adapters of users are loaded elsewhere.

        Answers that were awaited are not any more: their users take part again, as they were.
        """
        self._stopped = {int(user): why for user, why in state["stopped"].items()}
        if self._local is not None:
            self._local.forget_all()
            for user, why in self._stopped.items():
                self._local.end(user, why)
        self._gone = self._gone_at(max(step, 1))
        self.roster.set_absent(self._gone)

    def _stop(self, user: int, why: str) -> None:
        logger.error("user %s is stopped: %s", self.roster.names[user], why)
        self._stopped[user] = why
        if self._local is not None:
            self._local.end(user, why)

    def _hear(self, local: LocalUsers, step: int) -> None:
        """Lets users come back whose late answers are there; waits for one if nobody else is."""
        gone = self._gone_at(step)
        if local.late - gone and len(gone | local.late) == len(self.roster):
            local.wait_for_late_answer()
        for user, answer in local.take_late_answers().items():
            if isinstance(answer, str):
                self._stop(user, answer)
                continue
            self._load(user, {site: {"adapter": own} for site, own in answer.items()})
            logger.info("step %d: user %s is back", step, self.roster.names[user])

    def _gone_at(self, step: int) -> frozenset[int]:
        """Who takes no part by plan, or had to stop."""
        planned = {visit.user for visit in self._visits}
        staying = {
            visit.user
            for visit in self._visits
            if visit.join <= step and (visit.leave is None or step < visit.leave)
        }
        return frozenset((planned - staying) | self._stopped.keys())

    def _is_expected(self, step: int) -> bool:
        """Whether somebody is still to come by plan."""
        return any(visit.join > step for visit in self._visits)

    def _state(self, user: int) -> dict[SiteName, dict[str, Any]]:
        return {
            site: fitter.user_state(site, user)
            for fitter in self._fitters
            for site in fitter.adapters
        }

    def _load(self, user: int, state: UserState) -> None:
        for fitter in self._fitters:
            for site in fitter.adapters:
                fitter.load_user_state(site, user, state[site])
