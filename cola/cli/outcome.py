"""How a run ended, alone or as a job of a sweep, and how a sweep as a whole did.

A launcher's process sends an `Outcome` back to the sweep, hence plain values only.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

DONE, FAILED, BAD_CONFIG, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one run ended.

    Attributes:
        exit_code: of the command, had it been this run alone.
        is_skipped: whether there was nothing to do: finished already, or in another process.
        reason: why it failed or was skipped, one line.
        folder: the run's; None where it got none.
        log: file with what the run wrote instead of to the terminal; None where it went there.
    """

    exit_code: int
    is_skipped: bool = False
    reason: str = ""
    folder: Path | None = None
    log: Path | None = None

    @property
    def word(self) -> str:
        """What became of it."""
        if self.is_skipped:
            return "skipped"
        return {DONE: "done", INTERRUPTED: "interrupted"}.get(self.exit_code, "failed")

    @property
    def line(self) -> str:
        """The word, the reason, and where to look."""
        reason = f": {self.reason}" if self.reason else ""
        place = self.folder if self.folder and self.word != "failed" else self.log or self.folder
        return f"{self.word}{reason}" + (f" ({place})" if place else "")


def report_sweep(jobs: Sequence[Sequence[str]], outcomes: Sequence[Outcome]) -> int:
    """Logs every failure and then the counts, the last line; returns the sweep's exit code.

    Args:
        jobs: overrides of every job.
        outcomes: theirs, in the same order.

    Returns:
        0, 1 if a run failed, 2 if jobs were only badly configured.
    """
    for job, outcome in zip(jobs, outcomes, strict=True):
        if outcome.word == "failed":
            logger.error("sweep: %s: %s", " ".join(job) or "defaults", outcome.line)
    logger.info("sweep: jobs: %s", count_words(outcomes))
    codes = {outcome.exit_code for outcome in outcomes}
    return next(code for code in (FAILED, BAD_CONFIG, INTERRUPTED, DONE) if code in codes)


def count_words(outcomes: Iterable[Outcome]) -> str:
    """How many came to which end: `4 done, 1 skipped`."""
    words = Counter(outcome.word for outcome in outcomes)
    return ", ".join(f"{num} {word}" for word, num in sorted(words.items())) or "none ended"
