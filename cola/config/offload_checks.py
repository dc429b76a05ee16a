"""Checks of `offload` against what else is configured.

Part of `validate`; no Hydra and no torch. What the machine has is checked where workers are made.
"""

import re
from collections.abc import Collection

from cola.config.choices import AdapterKind, DType, MergeMode, OffloadTarget, Payload, WireDType
from cola.config.keys import flatten, word
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError

_GPU = re.compile(r"cuda:\d+")

_READERS = {
    "device": {OffloadTarget.gpu},
    "workers": {OffloadTarget.cpu},
    "payload": {OffloadTarget.cpu, OffloadTarget.gpu},
    "base_gradients": {OffloadTarget.cpu, OffloadTarget.gpu},
    "staleness": {OffloadTarget.cpu, OffloadTarget.gpu},
    "wire_dtype": {OffloadTarget.cpu, OffloadTarget.gpu},
}
"""Keys of `offload` and the targets that read them; the others are for all."""


def check_offload(config: ExperimentConfig, given: Collection[str]) -> None:
    """Refuses settings that have no effect, and payloads that cannot be formed.

    Raises:
        ConfigError: what was given, what is allowed, what to change.
    """
    offload, values = config.offload, flatten(config)
    for key, readers in _READERS.items():
        name = f"offload.{key}"
        if name in given and offload.name not in readers:
            takers = " or ".join(
                f"offload={reader.name}" for reader in OffloadTarget if reader in readers
            )
            raise ConfigError(
                f"{name}={word(values[name])} has no effect with offload={offload.name.name}: "
                f"use {takers}, or leave it out"
            )
    for device in offload.device or []:
        if not _GPU.fullmatch(device):
            raise ConfigError(
                f"offload.device={device}: give GPUs as cuda:INDEX, one or a list; the host's CPU "
                "is offload=cpu"
            )
    if len(set(offload.device or [])) < len(offload.device or []):
        raise ConfigError(f"offload.device={word(offload.device)}: names a GPU twice")
    if offload.base_gradients and offload.payload is not Payload.auto:
        raise ConfigError(
            "offload.base_gradients=true lets offload.payload=auto form low-rank and MLP "
            f"gradients on the base device, and offload.payload is {offload.payload.name}: use "
            "auto, or leave it out"
        )
    has_factors = offload.payload is Payload.factors
    is_narrow = offload.wire_dtype is WireDType.bfloat16
    if has_factors and is_narrow and config.model.dtype is DType.bfloat16:
        raise ConfigError(
            "offload.wire_dtype=bfloat16 with model.dtype=bfloat16: data of this model travels in "
            "bfloat16 anyway; leave it out"
        )
    if not has_factors:
        _check_payload(config)


def _check_payload(config: ExperimentConfig) -> None:
    payload, kind = config.offload.payload, config.adapter.kind
    if config.users.name.owns_adapters:
        raise ConfigError(
            f"offload.payload={payload.name} with users={config.users.name.name}: gradients of "
            "many users' adapters are formed where they are fitted; use offload.payload=factors, "
            "or users=one or joint"
        )
    is_gradient = payload is Payload.gradient
    if is_gradient and kind is not AdapterKind.linear and config.merge.mode is MergeMode.merged:
        raise ConfigError(
            f"offload.payload=gradient with adapter={kind.name} and merge=merged: the gradient of "
            "such an adapter needs its parameters, which a merge keeps off the base device; use "
            "merge=unmerged, adapter=linear or offload.payload=factors"
        )
