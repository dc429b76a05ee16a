"""A process that runs the jobs of one slot of a parallel sweep, one after another.

Differs from a pool of workers in that each slot has an executor of its own: a job that kills its
process (out of memory, a segmentation fault) takes no other job along, and the next one gets a new
process. Processes are kept, so that imports are paid once for each.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.backend import get_context
from joblib.externals.loky.process_executor import BrokenProcessPool

from cola.cli.outcome import FAILED, INTERRUPTED, Outcome
from cola.cli.slots import Slot

GRACE_SECONDS = 20.0
"""How long a job whose sweep was killed may take to save its state."""

_INTERRUPT, _LEAVE = True, False
"""What a sweep tells its processes."""

_is_orphan = threading.Event()
"""Whether the sweep that this process worked for is gone."""


class JobProcess:
    """Runs one job at a time on a slot."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._executor: Any = None
        self._job: Future[Outcome] | None = None

    def submit(self, job: Callable[[], Outcome], log: Path) -> "Future[Outcome]":
        """Begins a job; only when the last one has ended.

        Args:
            job: picklable; returns an outcome.
            log: takes what the job writes to its terminal.
        """
        if self._executor is None:
            self._start()
        self._job = self._executor.submit(_run_logged, job, log)
        return self._job

    def take_outcome(self) -> Outcome:
        """What the job returned, or why it returned nothing."""
        assert self._job is not None
        error = self._job.exception()
        if error is None:
            outcome: Outcome = self._job.result()
            return outcome
        if isinstance(error, KeyboardInterrupt):
            return Outcome(exit_code=INTERRUPTED)
        if isinstance(error, BrokenProcessPool):
            self.close()
            return Outcome(exit_code=FAILED, reason=f"its process died{_cause(error)}")
        return Outcome(exit_code=FAILED, reason=repr(error))

    def interrupt(self) -> None:
        """What Ctrl-C does to a run alone: it saves its state and ends."""
        self._order(_INTERRUPT)

    def close(self) -> None:
        """Ends the process, with its job if that has not ended."""
        if self._executor is not None:
            is_busy = self._job is not None and not self._job.done()
            self._order(_LEAVE)
            # An idle process takes seconds to unload its libraries, for which nobody has to wait.
            self._executor.shutdown(wait=is_busy, kill_workers=is_busy)
            self._executor = None

    def _order(self, order: bool) -> None:
        with contextlib.suppress(OSError):  # dead already
            self._orders.send(order)

    def _start(self) -> None:
        theirs, self._orders = get_context("loky").Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(
            max_workers=1,
            context=get_context("loky"),
            env=dict(self.slot.environment),
            initializer=_obey,
            initargs=(theirs,),
        )


def _run_logged(job: Callable[[], Outcome], log: Path) -> Outcome:
    """Runs a job with the process's output, that of native code included, in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        return job()
    finally:
        if _is_orphan.is_set():
            os._exit(INTERRUPTED)  # nobody reads the result, and a regular end takes seconds


def _obey(orders: Connection) -> None:
    """Prepares a process: the sweep passes on signals, and its end ends the process."""
    # Else the terminal's Ctrl-C came twice, from there and from the sweep, and the second one
    # stops a run without its state saved.
    os.setsid()
    # A sweep in the background of a script inherits that SIGINT is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()


def _listen(orders: Connection) -> None:
    try:
        while orders.recv() is _INTERRUPT:
            os.kill(os.getpid(), signal.SIGINT)
        return
    except (EOFError, OSError):  # the sweep was killed
        pass
    _is_orphan.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _cause(error: BaseException) -> str:
    """Names of the signals that ended a process, as far as they are known."""
    found = re.search(r"exit codes of the workers are \{(.*)\}", str(error))
    if found is None:
        return ""
    hint = ", out of memory?" if "SIGKILL" in found[1] else ""
    return f" ({found[1]}{hint})"
