"""Users who fit in processes of their own: their data goes out, their parameters come back.

The base model and the other users wait for them for a limited time; who is late then takes no part
until the answer comes, or leaves for good. Nothing that such a process does or sends can reach the
adapters of another user.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cola.adaptation_data import AdaptationData, concatenate
from cola.config.choices import LateUser
from cola.config.schema import OptimizerConfig
from cola.errors import ConfigError, OffloadError
from cola.offload.fit import Fit
from cola.offload.local_folder import LocalFolder
from cola.offload.local_payload import (
    Answer,
    describe,
    pack_adapters,
    pack_data,
    unpack_adapters,
)
from cola.roster import Roster
from cola.sites import SiteName
from cola.user_adapters import UserAdapters
from cola.user_rows import UserRows, user_folder

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.01
"""How often answers are looked for while the run waits."""


@dataclass
class _Round:
    """One adaptation: who has to answer, and what came back so far."""

    number: int = 0
    waiting: set[int] = field(default_factory=set)
    answers: dict[int, Answer] = field(default_factory=dict)


class LocalUsers:
    """All users of a run who fit in processes of their own.

    Attributes:
        waited_seconds: time spent waiting for answers so far.
    """

    def __init__(
        self,
        folder: Path,
        adapters: Mapping[SiteName, UserAdapters],
        roster: Roster,
        *,
        optimizer: OptimizerConfig,
        seconds: float,
        late: LateUser,
    ) -> None:
        """Nothing is written before `start`.

        Args:
            folder: every user gets a folder of its own in it.
            adapters: of all users at every site.
            roster: says who is local, and is told who has to stop.
            optimizer: of the run, for the rates of new heads.
            seconds: how long an adaptation waits for answers.
            late: what becomes of who has not answered then.
        """
        self._adapters = dict(adapters)
        self._roster = roster
        self._optimizer = optimizer
        self._seconds, self._late_user = seconds, late
        self._folders = {
            position: LocalFolder(folder / user_folder(user.name))
            for position, user in enumerate(roster.settings)
            if user.is_local
        }
        self._lock = threading.Lock()
        self._data: dict[int, dict[SiteName, list[AdaptationData]]] = {}
        self._round = _Round()
        self._late: dict[int, int] = {}  # the adaptation that a user still owes an answer to
        self.waited_seconds = 0.0

    @property
    def are_present(self) -> bool:
        """Whether one of them takes part now."""
        return any(user not in self._roster.absent for user in self._folders)

    @property
    def late(self) -> frozenset[int]:
        """Positions of users whose answer is overdue, and who take no part until it comes."""
        return frozenset(self._late)

    @property
    def has_answers(self) -> bool:
        """Whether an overdue answer has come; costs a look at each one's folder."""
        return any(self._folders[user].has_answer(number) for user, number in self._late.items())

    def start(self) -> None:
        """Makes the users' folders, so that their processes can begin.

        Raises:
            ConfigError: a folder cannot be made.
        """
        for user, folder in self._folders.items():
            name = self._roster.names[user]
            try:
                folder.open(
                    describe(self._adapters, user, self._roster.settings[user], self._optimizer)
                )
            except OSError as error:
                raise ConfigError(
                    f"users.local: no folder for user '{name}' ({error}); set users.local_dir to "
                    "a place that can be written"
                ) from error
            logger.info("user %s fits in a process of its own, in %s", name, folder.path)

    def take(self, site: SiteName, data: AdaptationData, rows: UserRows, first: int) -> None:
        """Keeps a copy of one batch's rows until the adaptation closes; callable from any thread.

        Args:
            site: that sent them.
            data: rows of local users alone.
            rows: whose they are; positions count from `first`.
            first: position of the first user.
        """
        for place, where in rows.slices():
            own = AdaptationData(
                hidden_input=data.hidden_input[where].to("cpu", copy=True),
                hidden_gradient=data.hidden_gradient[where].to("cpu", copy=True),
            )
            with self._lock:
                sites = self._data.setdefault(first + place, {})
                sites.setdefault(site, []).append(own)

    def hand_over(self, fit: Fit) -> None:
        """Gives every user with rows in the adaptation its data and its adapters.

        All data must have been taken, and no fit may be under way.
        """
        data, self._data = self._data, {}
        self._round = _Round(number=fit.number)
        facts = {
            "adaptation": fit.number,
            "learning_rate": fit.learning_rate,
            "answer_within_seconds": self._seconds,
        }
        for user, sites in sorted(data.items()):
            scale = fit.gradient_scale if fit.user_scales is None else fit.user_scales[user]
            try:
                tensors = pack_data(sites, scale, fit.number)
                tensors |= pack_adapters(self._adapters, user, "adapter/")
                self._folders[user].hand_over(fit.number, tensors, facts)
            except OffloadError as error:
                self._roster.stop(user, str(error))
            else:
                self._round.waiting.add(user)

    def collect(self, number: int) -> Mapping[int, Answer]:
        """What users answered to an adaptation, by position; waits for it, the first time.

        Who fails or is late is not among them.
        """
        current = self._round
        if current.number != number:
            return {}
        started = time.monotonic()
        while current.waiting:
            for user in [u for u in current.waiting if self._folders[u].has_answer(number)]:
                current.waiting.remove(user)
                answer = self._read(user, number)
                if isinstance(answer, str):
                    self._roster.stop(user, answer)
                else:
                    current.answers[user] = answer
            if time.monotonic() - started >= self._seconds:
                break
            if current.waiting:
                time.sleep(POLL_SECONDS)
        for user in sorted(current.waiting):
            self._note_late(user, number)
        current.waiting.clear()
        self.waited_seconds += time.monotonic() - started
        return current.answers

    def take_late_answers(self) -> dict[int, Answer | str]:
        """Overdue answers that have come, or why one cannot be used; their users wait no more."""
        come = {u: n for u, n in self._late.items() if self._folders[u].has_answer(n)}
        for user in come:
            del self._late[user]
        return {user: self._read(user, number) for user, number in come.items()}

    def wait_for_late_answer(self) -> None:
        """Waits once more, where nobody is left to go on without those who are late."""
        started = time.monotonic()
        while not self.has_answers and time.monotonic() - started < self._seconds:
            time.sleep(POLL_SECONDS)
        self.waited_seconds += time.monotonic() - started

    def forget(self, user: int) -> None:
        """Drops a user's data and the answer that it owes: it takes no part any more."""
        self._data.pop(user, None)
        self._late.pop(user, None)
        if user in self._folders:
            self._folders[user].clear()

    def forget_all(self) -> None:
        """Drops everything under way; no answer is awaited."""
        for user in self._folders:
            self.forget(user)
        self._round = _Round()

    def end(self, user: int, why: str) -> None:
        """Tells a user's process that no data will follow."""
        self.forget(user)
        folder = self._folders.pop(user, None)
        if folder is None:
            return
        try:
            folder.end(why)
        except OSError as error:
            logger.warning("user %s: %s", self._roster.names[user], error)

    def state_dict(self, site: SiteName) -> dict[str, Any]:
        """Data of an interval in progress."""
        return {
            str(user): vars(concatenate(sites[site]))
            for user, sites in self._data.items()
            if site in sites
        }

    def load_state_dict(self, site: SiteName, state: Mapping[str, Any]) -> None:
        """Continues inside an interval."""
        for user, own in state.items():
            self._data.setdefault(int(user), {})[site] = [AdaptationData(**own)]

    def close(self) -> None:
        """Ends the users' processes."""
        for user, number in self._late.items():
            name = self._roster.names[user]
            logger.warning("user %s has not answered adaptation %d to the end", name, number)
        for user in list(self._folders):
            self.end(user, "the run has ended")

    def _read(self, user: int, number: int) -> Answer | str:
        """An answer, or why it cannot be used; the round is over."""
        own, folder = pack_adapters(self._adapters, user), self._folders[user]
        shapes = {name: parameter.shape for name, parameter in own.items()}
        dtype = next(iter(own.values())).dtype
        try:
            return unpack_adapters(folder.read_answer(number, shapes, dtype))
        except OffloadError as error:
            return f"{error} (adaptation {number}, {folder.path})"
        finally:
            folder.remove(number)

    def _note_late(self, user: int, number: int) -> None:
        """Nobody waits for this user any more."""
        within = f"no answer within {self._seconds:g} s to adaptation {number}"
        if self._late_user is LateUser.drop:
            self._roster.stop(user, f"{within} (users.local_late=drop)")
            return
        logger.warning("user %s: %s; it waits", self._roster.names[user], within)
        self._late[user] = number
