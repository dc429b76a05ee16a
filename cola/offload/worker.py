"""Who runs fits: the caller itself, or threads of this host beside the base model's backward pass.

A worker is an executor that runs its tasks one after another, in the order of submission. A fleet
gives each adapter to one worker, so the tasks of one adapter never overtake one another.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

from cola.meters import BusyTimer

T = TypeVar("T")

MAX_PENDING = 2
"""Blocks, of any batch, whose data may wait for their worker before the base model has to: a worker
that has fallen behind need not wait in turn, and what is staged does not grow with the layers."""


class Backlog:
    """Tasks with data that wait for a worker, whichever adapters they are of."""

    def __init__(self) -> None:
        self._waiting: deque[Future[Any]] = deque()

    def add(self, task: "Future[Any]") -> None:
        """A task that has been queued; its data is let go when it is done."""
        self._waiting.append(task)

    def make_room(self) -> None:
        """Waits until fewer than `MAX_PENDING` are left, and raises what went wrong in them."""
        while len(self._waiting) >= MAX_PENDING:
            self._waiting.popleft().result()


class Worker(Protocol):
    """Runs tasks in order on one device."""

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """Queues a task, or runs it; its result or error is in the future."""

    def busy_seconds(self) -> float:
        """Time spent in tasks."""

    def stop(self) -> None:
        """Ends the worker once its queue is empty."""


class InlineWorker:
    """Runs every task at once in the caller's thread: adapters stay on the base device."""

    def __init__(self, device: torch.device) -> None:
        self._timer = BusyTimer(device)

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """Runs the task; an error is raised here and now."""
        done: Future[T] = Future()
        with self._timer.measure():
            done.set_result(task())
        return done

    def busy_seconds(self) -> float:
        """Time spent in tasks."""
        return self._timer.read()

    def stop(self) -> None:
        """Nothing to end."""


class ThreadWorker:
    """One thread with a queue. PyTorch releases the interpreter lock inside its kernels."""

    def __init__(self, name: str, device: torch.device, *, num_threads: int) -> None:
        """Starts with the first task.

        Args:
            name: of the thread.
            device: where its tasks run.
            num_threads: cores that one kernel of this worker may use on the host.
        """
        self._timer = BusyTimer(device)
        self._device, self._num_threads = device, num_threads
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=self._start)

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """Queues the task and returns at once."""
        return self._pool.submit(self._timed, task)

    def busy_seconds(self) -> float:
        """Time spent in tasks."""
        return self._timer.read()

    def stop(self) -> None:
        """Ends the thread once its queue is empty."""
        self._pool.shutdown()

    def _start(self) -> None:
        # Kernels size their pool by the calling thread's setting: fits must not take the cores
        # that the base model's own backward pass is using.
        torch.set_num_threads(self._num_threads)
        if self._device.type == "cuda":  # nor stand in line with copies to this GPU
            torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def _timed(self, task: Callable[[], T]) -> T:
        with self._timer.measure():
            return task()
