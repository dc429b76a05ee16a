"""Rows to padded batches: the last stage of a task, run once per step.

Text is padded to the longest row of the batch (`dynamic`) or to a fixed length. Models that
classify are padded on the right; causal ones on the left, with positions derived from the mask,
so that a row's logits do not depend on its padding. Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cola.config.choices import Objective, Padding
from cola.config.schema import TaskConfig
from cola.errors import ConfigError
from cola.interfaces import Batch, Example
from cola.tasks.encoding import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TextCollator:
    """Batches of rows from `encode_texts`, padded on the right.

    Attributes:
        pad_id: token id of padding.
        pad_type_id: token type of padding.
        length: T of every batch; None pads to the longest row.
        label_dtype: int64 for classes, float32 for values.
    """

    pad_id: int
    pad_type_id: int
    length: int | None
    label_dtype: torch.dtype

    def __call__(self, rows: Sequence[Example]) -> Batch:
        """Pad rows; `num_terms` is their number."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])  # (B,)
        positions = torch.arange(_padded_length(lengths, self.length))  # (T,)
        mask = positions < lengths[:, None]  # (B, T)
        inputs = {
            "input_ids": _pad([row["input_ids"] for row in rows], mask, self.pad_id),
            "attention_mask": mask.long(),
        }
        if "token_type_ids" in rows[0]:
            types = [row["token_type_ids"] for row in rows]
            inputs["token_type_ids"] = _pad(types, mask, self.pad_type_id)
        labels = torch.tensor([row["label"] for row in rows], dtype=self.label_dtype)
        return Batch(inputs=inputs, labels=labels, num_terms=len(rows))


@dataclass(frozen=True, kw_only=True)
class CausalCollator:
    """Batches of rows from `encode_responses`, padded on the left.

    Attributes:
        pad_id: token id of padding.
        length: T of every batch; None pads to the longest row.
    """

    pad_id: int
    length: int | None

    def __call__(self, rows: Sequence[Example]) -> Batch:
        """Pad rows; `num_terms` counts the labels that the shifted loss scores."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])  # (B,)
        width = _padded_length(lengths, self.length)
        first = width - lengths  # (B,) index of the first real token
        mask = torch.arange(width) >= first[:, None]  # (B, T)
        labels = _pad([row["labels"] for row in rows], mask, IGNORED)
        # The first real token is predicted at a pad (or at nothing). Scoring it would give the
        # pad row a gradient, and pad rows are dropped before they travel.
        labels.scatter_(1, first[:, None], IGNORED)
        inputs = {
            "input_ids": _pad([row["input_ids"] for row in rows], mask, self.pad_id),
            "attention_mask": mask.long(),
            "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0),
        }
        num_terms = int((labels[:, 1:] != IGNORED).sum())
        return Batch(inputs=inputs, labels=labels, num_terms=num_terms)


def collate_images(rows: Sequence[Example]) -> Batch:
    """Stack rows with `pixels` (C, H, W) float32 and an integer `label`."""
    labels = torch.tensor([row["label"] for row in rows])
    pixels = torch.stack([row["pixels"] for row in rows])  # (B, C, H, W)
    return Batch(inputs={"pixels": pixels}, labels=labels, num_terms=len(rows))


def build_text_collator(
    task: TaskConfig, objective: Objective, tokenizer: "PreTrainedTokenizerBase"
) -> TextCollator | CausalCollator:
    """The collator of a text task.

    Raises:
        ConfigError: the tokenizer has neither a padding nor an EOS token.
    """
    # GPT-2 and Llama have no padding token; any valid id will do, since it is masked.
    pad_id: Any = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = tokenizer.eos_token_id
    if pad_id is None:
        raise ConfigError("the tokenizer has neither a padding nor an EOS token to pad with")
    length = task.max_length if task.padding is Padding.max_length else None
    if objective is Objective.causal:
        return CausalCollator(pad_id=pad_id, length=length)
    return TextCollator(
        pad_id=pad_id,
        pad_type_id=tokenizer.pad_token_type_id,
        length=length,
        label_dtype=torch.float32 if objective is Objective.regression else torch.long,
    )


def _padded_length(lengths: Tensor, fixed: int | None) -> int:
    longest = int(lengths.max())
    if fixed is None:
        return longest
    assert longest <= fixed, f"a row of {longest} tokens was not truncated to {fixed}"
    return fixed


def _pad(values: Sequence[Tensor], mask: Tensor, filler: int) -> Tensor:
    """Unpadded rows (T_b,) laid into the true places of `mask`, (B, T)."""
    padded = torch.full(mask.shape, filler, dtype=values[0].dtype)
    padded[mask] = torch.cat(list(values))
    return padded
