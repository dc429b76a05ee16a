"""One process at a time for one run: a lock on its configuration within its family's folder.

The operating system drops the lock of a process that dies, so that nothing stale is left to judge.
On the configuration and not on the run's folder, because two workers that find no run to go on with
must not both start one.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cola.config.identity import CONFIG_FILE, config_hash, load_config
from cola.config.resume import ONCE, SEARCHES, find_run
from cola.config.schema import ExperimentConfig

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 30.0
"""How long `resume=once` waits for another process: a worker whose sweep was killed saves its state
and ends in less (`job_process.GRACE_SECONDS`); a run that goes on takes longer."""

POLL_SECONDS = 0.2


@contextlib.contextmanager
def claim_run(config: ExperimentConfig, run_dir: Path) -> Iterator[bool]:
    """Holds the run of a configuration for this process.

    Args:
        config: composed, defaults filled in; `resume` says which run is meant.
        run_dir: where a fresh run would write.

    Yields:
        Whether no other process holds it; a fresh run needs it only to keep others away.

    Raises:
        ConfigError: `resume` is a path to no run.
    """
    family, wanted = run_dir.parent, config_hash(config)
    if config.resume is not None and config.resume not in SEARCHES:
        folder = find_run("resume", config.resume, hint=", auto or once")
        family, wanted = folder.parent, config_hash(load_config(folder / CONFIG_FILE))
    family.mkdir(parents=True, exist_ok=True)
    path = family / f".{wanted}.lock"
    lock = _wait(path) if config.resume == ONCE else _try(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)  # before it is released: see `_try`
            os.close(lock)


def _wait(path: Path) -> int | None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (lock := _try(path)) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return lock


def _try(path: Path) -> int | None:
    """An open file that holds the lock; None if another process does."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # its last holder removed it after we opened it: nobody else would see ours
