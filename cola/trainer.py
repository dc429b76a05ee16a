"""The loop, one for every method: Algorithm 1 over a learner.

The learner decides who computes gradients and where; the loop decides what is a step, when an
interval closes, and when to log, evaluate and save.
"""

import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cola.batches import BatchStream
from cola.checkpoint import Checkpoints
from cola.config.choices import SelectOn
from cola.config.schema import EvaluationConfig, GenerationConfig, TrainerConfig
from cola.errors import TrainingError
from cola.evaluation import Evaluation, evaluate
from cola.horizon import Horizon, Progression
from cola.interfaces import Adaptation, Learner, Measurements
from cola.meters import MIB, peak_mib, reset_peaks, resident_mib
from cola.optimizers import LearningRateSchedule
from cola.progress import Progress
from cola.runtime import StopRequest, generator_states, restore_generators
from cola.task_data import Split, TaskData
from cola.tracking import Trackers

logger = logging.getLogger(__name__)

MAX_WINDOWS = 1000
"""Logged windows whose costs are remembered for the medians of the summary."""


class Trainer:
    """Runs a learner over a task."""

    def __init__(
        self,
        *,
        learner: Learner,
        task: TaskData,
        stream: BatchStream,
        horizon: Horizon,
        schedule: LearningRateSchedule,
        config: TrainerConfig,
        evaluation: EvaluationConfig,
        generation: GenerationConfig,
        checkpoint_every: int | None,
        checkpoints: Checkpoints,
        tracker: Trackers,
        device: torch.device,
    ) -> None:
        self.progression = Progression()
        selects_on_test = evaluation.select_on is SelectOn.test
        self.selection = task.report if selects_on_test else task.selection
        self._learner = learner
        self._task = task
        self._stream = stream
        self._horizon = horizon
        self._schedule = schedule
        self._config = config
        self._eval_every = config.eval_every or horizon.steps_per_epoch
        self._evaluation = evaluation
        self._generation = generation
        self._checkpoint_every = checkpoint_every
        self._checkpoints = checkpoints
        self._tracker = tracker
        self._device = device
        self._costs: dict[str, float] = {}
        self._window_start = (0, 0.0)
        self._paused_seconds = 0.0

    def run(self, stop: StopRequest) -> None:
        """Trains to the horizon from wherever the run is, then brings back the best parameters.

        Raises:
            KeyboardInterrupt: a stop was requested; the state is saved.
            TrainingError: the loss is not finite.
        """
        started = time.perf_counter() - self.progression.seconds
        self._begin_window()
        with Progress(self.progression.step, self._horizon.steps) as progress:
            batches = self._stream.batches(self.progression.step + 1, self._horizon.steps)
            for step, batch in batches:  # line 2
                closing = self._closing(step)  # line 12
                loss = self._learner.record(batch, closing)  # lines 3 to 9; fits start site by site
                if closing is not None:
                    self._learner.update(closing)  # lines 10 to 16
                self._look_after(step, loss, progress)
                self.progression.seconds = time.perf_counter() - started
                if self._is_checkpoint(step) or stop.is_set:
                    with self._paused():
                        self._checkpoints.save(step, self.state_dict())
                if stop.is_set and step < self._horizon.steps:
                    raise KeyboardInterrupt
        self._learner.load_state_dict(self._checkpoints.load_best()["learner"])

    def score(self, split: Split, merged: bool | None = None) -> Evaluation:
        """Evaluates the current parameters; metered apart from training.

        Args:
            split: rows to score.
            merged: adapters inside the weights or beside them; None: as configured.
        """
        started = time.perf_counter()
        with self._paused():
            with self._learner.evaluating(merged) as model:
                found = evaluate(
                    model,
                    split,
                    self._task,
                    config=self._evaluation,
                    generation=self._generation,
                    device=self._device,
                    route=self._learner.route,
                    present=self._learner.present_users(),
                )
            _note_peaks(self.progression.evaluation_peaks_mib, self._learner.measure())
        self.progression.evaluation_seconds += time.perf_counter() - started
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on with the same bits."""
        learner = self._learner.state_dict()  # drains; dropout may not run after this line
        return {
            "learner": learner,
            "progression": vars(self.progression),
            "generators": generator_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self._learner.load_state_dict(state["learner"])
        self.progression = Progression(**state["progression"])
        restore_generators(state["generators"])

    def median_costs(self) -> dict[str, float]:
        """Median over logged windows of every cost per step; the first one warms up."""
        windows = self.progression.windows
        steady = windows[1:] or windows
        keys = steady[0] if steady else {}
        return {key: statistics.median(window[key] for window in steady) for key in keys}

    def _closing(self, step: int) -> Adaptation | None:
        if not self._horizon.closes_interval(step):
            return None
        return Adaptation(number=self._index(step) + 1, learning_rate=self._rate(step))

    def _rate(self, step: int) -> float:
        return self._schedule.rate(self._index(step))

    def _index(self, step: int) -> int:
        return (step - 1) // self._horizon.interval

    def _look_after(self, step: int, loss: Tensor, progress: Progress) -> None:
        """Everything around a step that is not the method: progress, log, evaluation."""
        self.progression.step = step
        progress.advance()
        if step % self._config.log_every == 0 or step == self._horizon.steps:
            progress.show(self._log(step, loss, self._rate(step)))
        if self._is_evaluation(step):
            self._select(step)

    def _is_evaluation(self, step: int) -> bool:
        return step % self._eval_every == 0 or step == self._horizon.steps

    def _is_checkpoint(self, step: int) -> bool:
        if self._checkpoint_every is None:
            return self._is_evaluation(step)
        return step % self._checkpoint_every == 0 or step == self._horizon.steps

    def _log(self, step: int, loss: Tensor, rate: float) -> dict[str, float]:
        value = loss.item()  # the base device is waited for here, and only here
        if not math.isfinite(value):
            raise TrainingError(
                f"the training loss is {value} at step {step}: lower optimizer.lr "
                f"({self._schedule.peak:g}), set optimizer.clip, or check the data"
            )
        metrics = {
            "train/loss": value,
            "train/epoch": step / self._horizon.steps_per_epoch,
            "train/learning_rate": rate,
            **self._end_window(step),
        }
        self._tracker.log(step, metrics)
        return metrics

    def _select(self, step: int) -> None:
        found = self.score(self.selection)
        self._tracker.log(step, found.metrics("selection"))
        self._tracker.log_samples(step, self.selection.name, found.samples)
        name, value = next(iter(found.scores.items()))
        logger.info("step %d: %s %.4f on %s", step, name, value, self.selection.name)
        users, before = sorted(found.by_user), self.progression.best_users
        # A score of other users says nothing about which of two models is the better one.
        is_first = self.progression.best_step == 0 or before not in (None, users)
        if value > self.progression.best_value or is_first:
            self.progression.best_value, self.progression.best_step = value, step
            self.progression.best_users = users
            self._checkpoints.save_best({"learner": self._learner.state_dict(), "step": step})

    def _begin_window(self) -> None:
        self._costs = _cumulative(self._learner.measure())
        self._window_start = (self.progression.step, time.perf_counter())
        self._paused_seconds = 0.0

    def _end_window(self, step: int) -> dict[str, float]:
        """Costs per step since the last logged step, and memory now."""
        first, start = self._window_start
        before, num_steps = self._costs, step - first
        elapsed = time.perf_counter() - start - self._paused_seconds
        measured = self._learner.measure()
        costs = {
            key: (value - before[key]) / num_steps for key, value in _cumulative(measured).items()
        }
        costs["time/iteration_seconds"] = elapsed / num_steps
        self.progression.windows = [*self.progression.windows, costs][-MAX_WINDOWS:]
        _note_peaks(self.progression.peaks_mib, measured)
        self._begin_window()
        memory = {f"memory/{d}_peak_mib": mib for d, mib in self.progression.peaks_mib.items()}
        memory["memory/base_device_peak_mib"] = self.progression.peaks_mib[str(self._device)]
        for device, owners in measured.held_bytes.items():
            memory |= {f"memory/{device}_{owner}_mib": num / MIB for owner, num in owners.items()}
        return {**costs, **memory, "memory/resident_mib": resident_mib(), **measured.extra}

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Work that is not training: left out of iteration times and of training peaks."""
        started = time.perf_counter()
        measured = self._learner.measure()
        devices = [torch.device(name) for name in measured.held_bytes]
        _note_peaks(self.progression.peaks_mib, measured)
        reset_peaks(devices)
        yield
        reset_peaks(devices)
        self._paused_seconds += time.perf_counter() - started


def _note_peaks(peaks_mib: dict[str, float], measured: Measurements) -> None:
    for device, mib in peak_mib(measured.held_bytes).items():
        peaks_mib[device] = max(mib, peaks_mib.get(device, 0.0))


def _cumulative(measured: Measurements) -> dict[str, float]:
    return {
        "time/base_seconds": measured.base_seconds,
        "time/stall_seconds": measured.stall_seconds,
        "time/offload_seconds": measured.offload_seconds,
        "wire/bytes_per_step": measured.wire_bytes,
    }
