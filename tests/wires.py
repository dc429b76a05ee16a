"""A wire on one device, on which copies take their time."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from cola.adaptation_data import Parcel
from cola.offload.staging import Staging
from cola.offload.transfer import Cargo, Shipment, Transfer

MAX_LAG_SECONDS = 0.004


class LaggingTransfer(Transfer):
    """A wire on one device: tensors are read some time after they were sent, in order."""

    def __init__(self, *args: torch.device, **settings: torch.dtype | None) -> None:
        super().__init__(*args, **settings)
        self.crosses = True
        self.num_copies = 0
        self._wire = ThreadPoolExecutor(1)
        self._lag = random.Random(0)
        self._under_way: list[Future[None]] = []
        self._staging = Staging(lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))

    def begin_step(self) -> None:
        """No streams here."""
        self.forget()

    def forget(self) -> None:
        """What goes on after this comes after all copies, as on a GPU's stream."""
        super().forget()
        for arriving in self._under_way:
            arriving.result()
        self._under_way.clear()

    def ship(self, cargo: Sequence[Cargo]) -> list[Parcel]:
        self.num_copies += len(cargo)
        return [self._ship_late(one) for one in cargo]

    def _ship_late(self, cargo: Cargo) -> Parcel:
        landed = self._staging.take(cargo.load())

        def copy_late() -> None:
            time.sleep(MAX_LAG_SECONDS * self._lag.random() ** 4)
            landed.copy_(self._load(cargo))

        arriving = self._wire.submit(copy_late)
        self._under_way.append(arriving)
        return Shipment(landed, lambda _: arriving.result(), self.staged)
