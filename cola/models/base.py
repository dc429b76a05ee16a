"""What every builder of this package returns, and the rules that they share.

Random weights come from the seed alone, and everything that no pretrained file can restore is
known by name.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cola.config.choices import DType
from cola.config.schema import ModelConfig
from cola.sites import SiteName, SiteSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model and the facts the rest of a run needs about it.

    The module is in evaluation mode and not frozen: the learner decides both.

    Attributes:
        module: called as `module(**batch.inputs)`, answers with an object that has `.logits`.
        tokenizer: None for image models and on the meta device.
        sites: in the order in which the module lists its sub-modules.
        new_parameters: parameters and persistent buffers that came from no pretrained file.
        decoder_start_id: token that the decoder of an encoder-decoder writes after; None for
            every other model, and for one that classifies.
    """

    module: nn.Module
    tokenizer: "PreTrainedTokenizerBase | None"
    sites: dict[SiteName, SiteSpec]
    new_parameters: frozenset[str]
    decoder_start_id: int | None = None

    @property
    def num_parameters(self) -> int:
        """Numbers in the base model; a tied parameter counts once."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def model_label(model: ModelConfig) -> str:
    """What messages call a model: its name, or its path if the name (`hf`) says nothing."""
    return model.name if model.architecture or model.path is None else model.path


def stored_names(module: nn.Module) -> frozenset[str]:
    """Names of parameters and persistent buffers; a tied parameter appears under one name."""
    parameters = {name for name, _ in module.named_parameters()}
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return frozenset(parameters | (module.state_dict().keys() - aliases))


@contextmanager
def seeded_weights(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Random weights drawn inside depend on the seed alone; the global state is left as found.

    On a GPU they are other ones than on the CPU.
    """
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # Not torch.manual_seed, which would also reseed every other GPU.
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def cast_parameters(module: nn.Module, dtype: DType) -> None:
    """Rounds parameters to a dtype in place, keeping ties.

    Drawing in float32 and rounding afterwards gives every dtype the same weights. Buffers stay:
    rotary frequencies must not be rounded.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch_dtype(dtype))


def autocast_forward(module: nn.Module) -> None:
    """Makes a float32 model's forward compute matrix products in bfloat16, in place.

    Whoever runs the model (training, evaluation, generation, the peft library) calls this very
    forward, so all of them agree. A backward pass follows the types of its forward by itself.
    """
    forward = module.forward

    @functools.wraps(forward)  # transformers reads the signature
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(module.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            return forward(*args, **kwargs)

    module.forward = run


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch type that a configured dtype names."""
    found = getattr(torch, dtype.name)
    assert isinstance(found, torch.dtype)
    return found
