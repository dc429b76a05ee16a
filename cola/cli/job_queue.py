"""The jobs of a parallel sweep: one queue, taken from whenever a slot is free."""

import dataclasses
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cola.cli.job_process import JobProcess
from cola.cli.outcome import Outcome, count_words
from cola.cli.slots import Slot

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a sweep.

    Attributes:
        words: its overrides, for the log.
        run: does it, in another process, and returns its outcome.
        log: file that takes what it writes to the terminal.
    """

    words: str
    run: Callable[[], Outcome]
    log: Path


@dataclass(frozen=True, kw_only=True)
class _Running:
    index: int
    process: JobProcess
    began: float


class JobQueue:
    """Runs all jobs; a line in the log for each that begins or ends."""

    def __init__(self, jobs: Sequence[Job], slots: Sequence[Slot]) -> None:
        self._jobs = jobs
        self._processes = [JobProcess(slot) for slot in slots]
        self._running: dict[Future[Outcome], _Running] = {}
        self._outcomes: dict[int, Outcome] = {}

    def run(self) -> list[Outcome]:
        """Outcomes of the jobs, in their order.

        Raises:
            KeyboardInterrupt: on SIGINT or SIGTERM, when all jobs have saved their state.
        """
        waiting = list(range(len(self._jobs)))
        idle = list(self._processes)
        with _terminate_as_interrupt():
            try:
                while waiting or self._running:
                    while waiting and idle:
                        self._begin(waiting.pop(0), idle.pop(0))
                    idle += self._end_some()
            except KeyboardInterrupt:
                self._interrupt(len(waiting))
                raise
            finally:
                for process in self._processes:
                    process.close()
        return [self._outcomes[index] for index in range(len(self._jobs))]

    def _begin(self, index: int, process: JobProcess) -> None:
        job = self._jobs[index]
        logger.info("sweep: %s on %s: %s", self._name(index), process.slot.device, job.words)
        future = process.submit(job.run, job.log)
        self._running[future] = _Running(index=index, process=process, began=time.monotonic())

    def _end_some(self) -> list[JobProcess]:
        """Waits until a job ends; the processes that are free then."""
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        freed = []
        for future in ended:
            running = self._running.pop(future)
            self._end(running)
            freed.append(running.process)
        return freed

    def _end(self, running: _Running) -> None:
        log = self._jobs[running.index].log
        outcome = dataclasses.replace(running.process.take_outcome(), log=log)
        self._outcomes[running.index] = outcome
        seconds = time.monotonic() - running.began
        logger.info("sweep: %s, %.0f s: %s", self._name(running.index), seconds, outcome.line)

    def _interrupt(self, num_waiting: int) -> None:
        """Ends running jobs as Ctrl-C would, each after its current step."""
        logger.warning("sweep: interrupted; running jobs save their state (again: stop at once)")
        for running in self._running.values():
            running.process.interrupt()
        while self._running:
            self._end_some()
        ended = count_words(self._outcomes.values())
        logger.warning("sweep: interrupted: %s, %d not begun", ended, num_waiting)

    def _name(self, index: int) -> str:
        return f"job {index + 1} of {len(self._jobs)}"


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM, as a scheduler sends it, means what Ctrl-C means."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
