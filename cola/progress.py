"""The progress bar of a run: loss, rate, time left and peak memory, at most once a second."""

from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


class Progress:
    """A bar over steps that other log lines do not tear apart."""

    def __init__(self, done: int, total: int) -> None:
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            mininterval=1.0,
            dynamic_ncols=True,
        )
        self._redirect = logging_redirect_tqdm()

    def __enter__(self) -> "Progress":
        self._redirect.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._redirect.__exit__(kind, error, trace)
        self._bar.close()

    def advance(self) -> None:
        """One step done."""
        self._bar.update()

    def show(self, metrics: Mapping[str, float]) -> None:
        """Puts the numbers of a logged step beside the bar."""
        peak = sum(value for key, value in metrics.items() if key.endswith("_peak_mib"))
        note = {
            "loss": f"{metrics['train/loss']:.4f}",
            "lr": f"{metrics['train/learning_rate']:.1e}",
            "peak": f"{peak:.1f}MiB",
        }
        self._bar.set_postfix(note, refresh=False)
