"""What travels between a run and a user's own process, as values and tensors by name.

Out: a description of the user's adapters, the data of an adaptation, and the adapters as they are.
Back: new parameters. `local_folder` puts them into files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cola.adaptation_data import AdaptationData, concatenate
from cola.adapters import AdapterState, describe_adapter
from cola.config.schema import OptimizerConfig
from cola.config.user_settings import UserSettings
from cola.errors import OffloadError
from cola.optimizers import rate_factor
from cola.sites import SiteName
from cola.user_adapters import UserAdapters

Adapters = Mapping[SiteName, UserAdapters]

Answer = Mapping[SiteName, AdapterState]
"""One user's new parameters at every site."""


def describe(
    adapters: Adapters, position: int, user: UserSettings, optimizer: OptimizerConfig
) -> dict[str, Any]:
    """What a process has to know of a user's adapters before any data; JSON values.

    Args:
        adapters: of all users.
        position: of the user.
        user: its settings.
        optimizer: of the run, for the rate of new heads.
    """
    described = {}
    for site, own in adapters.items():
        factor = rate_factor(optimizer, is_head=own.spec.is_head)
        described[site] = {
            **describe_adapter(own.member(position)),
            "learning_rate_factor": factor * user.rate,
        }
    return {"user": user.name, "alpha": user.alpha, "adapters": described}


def pack_data(
    data: Mapping[SiteName, Sequence[AdaptationData]], scale: float, number: int
) -> dict[str, Tensor]:
    """A user's rows of one adaptation, `<site>/hidden_input` and `<site>/hidden_gradient`.

    Args:
        data: batches by site.
        scale: factor on all gradients.
        number: of the adaptation.

    Raises:
        OffloadError: the data is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for site, batches in data.items():
        own = concatenate(batches)
        gradient = own.hidden_gradient * scale
        if not (own.hidden_input.isfinite().all() and gradient.isfinite().all()):
            raise OffloadError(
                f"the hidden gradient of site {site!r} is not finite in adaptation {number}"
            )
        tensors[f"{site}/hidden_input"] = own.hidden_input
        tensors[f"{site}/hidden_gradient"] = gradient
    return tensors


def pack_adapters(adapters: Adapters, position: int, prefix: str = "") -> dict[str, Tensor]:
    """Copies of a user's parameters on the CPU, `<site>/<prefix><parameter>`, of its own rank."""
    tensors = {}
    for site, own in adapters.items():
        stack, place = own.stack_of(position)
        for name, parameter in stack.member_state(place).items():
            tensors[f"{site}/{prefix}{name}"] = parameter.cpu()
    return tensors


def unpack_adapters(tensors: Mapping[str, Tensor]) -> Answer:
    """The inverse of `pack_adapters`: parameters by site."""
    answer: dict[SiteName, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        site, _, name = key.rpartition("/")
        answer.setdefault(site, {})[name] = tensor
    return answer
