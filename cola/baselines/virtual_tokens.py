"""Prompt, prefix and p-tuning: PEFT's virtual tokens behind the interface of a plain model.

A run calls every model as `model(**batch.inputs).logits` and `model.generate(...)`. PEFT prepends
virtual tokens, to which this wrapper fits positions and logits. Shapes: B rows, T tokens, P virtual
tokens, V words.
"""

import inspect
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cola.baselines.adalora import ADAPTER
from cola.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VirtualTokenModel(nn.Module):
    """A PEFT model with virtual tokens, called like its base model."""

    def __init__(self, peft_model: Any, *, is_causal: bool) -> None:
        """Wraps a model.

        Args:
            peft_model: a PeftModel of prompt, prefix or p-tuning, which is not typed.
            is_causal: a decoder writes text, so that rows are padded on the left.
        """
        super().__init__()
        self.peft_model = peft_model
        self._is_causal = is_causal
        if is_causal:
            base = peft_model.get_base_model()
            base.register_forward_pre_hook(_derive_positions, with_kwargs=True)

    def forward(self, **inputs: Tensor) -> Any:
        """The base model's output; `logits` (B, T, V) are those of the T tokens given."""
        # PEFT refuses them; they are derived behind it, where the virtual tokens are in the mask.
        inputs.pop("position_ids", None)
        output = self.peft_model(**inputs)
        if self._is_causal:
            output.logits = output.logits[:, -inputs["input_ids"].shape[1] :]
        return output

    def generate(self, **settings: Any) -> Any:
        """Token ids as from the base model: virtual tokens are not among them."""
        with warnings.catch_warnings():
            # transformers passes positions on, PEFT drops them aloud: see `_derive_positions`.
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            return self.peft_model.generate(**settings)

    @property
    def generation_config(self) -> Any:
        """The base model's."""
        return self.peft_model.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, settings: Any) -> None:
        self.peft_model.get_base_model().generation_config = settings


def _derive_positions(
    base_model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Positions that count no padding: PEFT's own would, and a row would depend on its batch.

    The mask covers virtual tokens and what the cache holds, too; the last T columns are the input.
    Without a mask nothing is padded, and the base model counts right by itself.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, P + T)
    inputs["position_ids"] = positions[:, -tokens.shape[1] :]
    return args, inputs


@torch.no_grad()
def start_from_text(peft_model: Any, tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
    """Fills the virtual tokens of prompt tuning with a text, repeated or cut to their number.

    PEFT can do it, but only with a tokenizer that it loads by name.

    Raises:
        ConfigError: the text has no token.
    """
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ConfigError(f"method.init_text={text!r} has no token; set it to some words")
    weight = peft_model.prompt_encoder[ADAPTER].embedding.weight
    repeated = torch.tensor(ids * math.ceil(len(weight) / len(ids)), device=weight.device)
    weight.copy_(peft_model.word_embeddings(repeated[: len(weight)]))


def takes_prefix(module: Any) -> bool:
    """Whether a Hugging Face model takes keys and values from outside."""
    parts = (module, module.base_model)
    return any("past_key_values" in inspect.signature(part.forward).parameters for part in parts)


def num_positions(module: Any) -> int | None:
    """Tokens that a model's positions suffice for; None if it knows no limit."""
    table = getattr(module.config, "max_position_embeddings", None)
    if table is None or table <= 0:  # XLNet says -1
        return None
    for name, child in module.named_modules():
        # RoBERTa starts to count behind the index of its padding.
        if name.endswith("position_embeddings") and getattr(child, "padding_idx", None) is not None:
            return int(table - child.padding_idx - 1)
    return int(table)
