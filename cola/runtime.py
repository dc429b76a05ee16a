"""Process-wide state of a run: devices, dtypes, generators, and stopping politely."""

import functools
import logging
import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cola.errors import ConfigError

logger = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """The base model's device; `auto` is the first GPU if there is one.

    Raises:
        ConfigError: the machine has no such device.
    """
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if num_gpus else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ConfigError(
            f"device={name} asks for GPU {device.index or 0}, and this machine has {num_gpus}; set "
            "device=auto or device=cpu"
        )
    return device


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the host to a device, without waiting for the device."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def set_matmul_precision(*, tf32: bool, device: torch.device) -> None:
    """Whether float32 products and convolutions of a GPU are rounded to TF32.

    Set either way: a run must not inherit what its process did before, nor PyTorch's own default,
    which rounds convolutions and not products.
    """
    if tf32 and device.type == "cpu":
        logger.warning("model.tf32=true has no effect on device=cpu: only GPUs round to TF32")
    precision = "tf32" if tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


def product_dtype(values: Tensor, master: torch.dtype) -> torch.dtype:
    """What products of low-precision values are formed in: their own type where that is fast.

    GPUs and newer CPUs multiply bfloat16 natively and sum in float32; on others it is emulated.

    Args:
        values: adaptation data.
        master: of the parameters and optimizer states, float32 or float64.
    """
    is_narrow = values.dtype is torch.bfloat16
    return values.dtype if is_narrow and _has_bfloat16_products(values.device.type) else master


@functools.cache
def _has_bfloat16_products(device_type: str) -> bool:
    return device_type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def seed_everything(seed: int) -> None:
    """Seeds every global generator: dropout of the base model draws from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_states() -> dict[str, Any]:
    """State of every global generator, for a checkpoint."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "state": list(internal), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": dict(enumerate(torch.cuda.get_rng_state_all())),
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Puts the global generators back; GPUs that are gone are left out."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["state"]), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(states["torch"])
    for index, state in states["cuda"].items():
        if int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(index))


class StopRequest:
    """Whether the user asked the run to stop (Ctrl-C, or SIGTERM of a scheduler)."""

    def __init__(self) -> None:
        self.is_set = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:  # asked twice: stop at once
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turns the first signal into a request that the loop honours after the current step."""
    request = StopRequest()
    previous = {
        number: signal.signal(number, request._handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
