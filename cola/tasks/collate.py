"""Rows to padded batches: the last stage of a task, run once per step.

Text is padded to the longest row of the batch (`dynamic`) or to a fixed length. Models that
classify and encoder-decoders are padded on the right; causal ones on the left, with positions
derived from the mask, so that a row's logits do not depend on its padding. Shapes: B rows, S tokens
of an encoder-decoder's source, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cola.config.choices import Objective, Padding
from cola.config.schema import TaskConfig
from cola.errors import ConfigError
from cola.sites import RowStream
from cola.task_data import Batch, Example
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
        """Pad rows; each is one term."""
        ids = [row["input_ids"] for row in rows]
        mask = _right_mask(ids, self.length)  # (B, T)
        inputs = {"input_ids": _pad(ids, mask, self.pad_id), "attention_mask": mask.long()}
        if "token_type_ids" in rows[0]:
            types = [row["token_type_ids"] for row in rows]
            inputs["token_type_ids"] = _pad(types, mask, self.pad_type_id)
        labels = torch.tensor([row["label"] for row in rows], dtype=self.label_dtype)
        row_terms = torch.ones(len(rows), dtype=torch.long)
        return _batch(inputs, labels, row_terms, {RowStream.inputs: mask})


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
        """Pad rows; terms are the labels that the shifted loss scores."""
        ids = [row["input_ids"] for row in rows]
        mask = _left_mask(ids, self.length)  # (B, T)
        labels = _pad([row["labels"] for row in rows], mask, IGNORED)
        # The first real token is predicted at a pad (or at nothing). Scoring it would give the
        # pad row a gradient, and pad rows are dropped before they travel.
        first = mask.shape[1] - mask.sum(dim=1, keepdim=True)  # (B, 1)
        labels.scatter_(1, first, IGNORED)
        inputs = {
            "input_ids": _pad(ids, mask, self.pad_id),
            "attention_mask": mask.long(),
            "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0),
        }
        row_terms = (labels[:, 1:] != IGNORED).sum(dim=1)
        return _batch(inputs, labels, row_terms, {RowStream.inputs: mask})


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Batches of rows from `encode_pairs`, both sides padded on the right.

    Attributes:
        pad_id: token id of padding.
        start_id: token id that the decoder starts from.
        length: S and T of every batch; None pads to the longest source and target.
    """

    pad_id: int
    start_id: int
    length: int | None

    def __call__(self, rows: Sequence[Example]) -> Batch:
        """Pad rows; terms are label tokens."""
        ids, targets = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        mask, is_scored = _right_mask(ids, self.length), _right_mask(targets, self.length)
        labels = _pad(targets, is_scored, IGNORED)  # (B, T)
        # The decoder reads what it should have written one step before.
        decoder_ids = _pad(targets, is_scored, self.pad_id).roll(1, dims=1)
        decoder_ids[:, 0] = self.start_id
        inputs = {
            "input_ids": _pad(ids, mask, self.pad_id),  # (B, S)
            "attention_mask": mask.long(),
            "decoder_input_ids": decoder_ids,
        }
        masks = {RowStream.inputs: mask, RowStream.targets: is_scored}
        return _batch(inputs, labels, is_scored.sum(dim=1), masks)


@dataclass(frozen=True, kw_only=True)
class PromptCollator:
    """Pads `prompt_ids` to the longest of the batch, for generation.

    Attributes:
        pad_id: token id of padding.
        is_left: a causal model goes on at the end of its prompt, so that pads come first.
    """

    pad_id: int
    is_left: bool

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, both (B, T)."""
        ids = [row["prompt_ids"] for row in rows]
        mask = _left_mask(ids, None) if self.is_left else _right_mask(ids, None)
        return {"input_ids": _pad(ids, mask, self.pad_id), "attention_mask": mask.long()}


def collate_images(rows: Sequence[Example]) -> Batch:
    """Stack rows with `pixels` (C, H, W) float32 and an integer `label`."""
    labels = torch.tensor([row["label"] for row in rows])
    pixels = torch.stack([row["pixels"] for row in rows])  # (B, C, H, W)
    return _batch({"pixels": pixels}, labels, torch.ones(len(rows), dtype=torch.long), {})


def build_text_collator(
    task: TaskConfig,
    objective: Objective,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    decoder_start_id: int | None = None,
) -> TextCollator | CausalCollator | PairCollator:
    """The collator of a text task.

    Args:
        task: says how long a batch is padded.
        objective: of the task's problem.
        tokenizer: names the padding token.
        decoder_start_id: token id that an encoder-decoder starts writing from.

    Raises:
        ConfigError: the tokenizer has neither a padding nor an EOS token, or an encoder-decoder
            no start token.
    """
    pad_id = _pad_id(tokenizer)
    length = task.max_length if task.padding is Padding.max_length else None
    if objective is Objective.causal:
        return CausalCollator(pad_id=pad_id, length=length)
    if objective is Objective.seq2seq:
        if decoder_start_id is None:
            raise ConfigError(
                "the model's configuration has no decoder_start_token_id, which an "
                "encoder-decoder starts writing from; choose another model, e.g. model=bart-base"
            )
        return PairCollator(pad_id=pad_id, start_id=decoder_start_id, length=length)
    return TextCollator(
        pad_id=pad_id,
        pad_type_id=tokenizer.pad_token_type_id,
        length=length,
        label_dtype=torch.float32 if objective is Objective.regression else torch.long,
    )


def build_prompt_collator(
    objective: Objective, tokenizer: "PreTrainedTokenizerBase"
) -> PromptCollator:
    """The collator of what a writing model is given.

    Raises:
        ConfigError: the tokenizer has neither a padding nor an EOS token.
    """
    return PromptCollator(pad_id=_pad_id(tokenizer), is_left=objective is Objective.causal)


def _pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """GPT-2 and Llama have no padding token; any valid id will do, since it is masked."""
    for pad_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(pad_id, int):
            return pad_id
    raise ConfigError("the tokenizer has neither a padding nor an EOS token to pad with")


def _batch(
    inputs: dict[str, Tensor],
    labels: Tensor,
    row_terms: Tensor,
    row_masks: Mapping[RowStream, Tensor],
) -> Batch:
    """A batch that counts its rows' terms (B,) and knows where they are padded, (B, T)."""
    return Batch(
        inputs=inputs,
        labels=labels,
        num_terms=int(row_terms.sum()),
        row_terms=row_terms,
        row_masks=row_masks,
    )


def _right_mask(rows: Sequence[Tensor], fixed: int | None) -> Tensor:
    """True where a row's tokens are, (B, T), with padding on the right."""
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    return torch.arange(_padded_length(lengths, fixed)) < lengths[:, None]


def _left_mask(rows: Sequence[Tensor], fixed: int | None) -> Tensor:
    """The same with padding on the left."""
    return _right_mask(rows, fixed).flip(1)


def _padded_length(lengths: Tensor, fixed: int | None) -> int:
    longest = int(lengths.max())
    if fixed is None:
        return longest
    assert longest <= fixed, f"a row of {longest} tokens was not truncated to {fixed}"
    return fixed


def _pad(values: Sequence[Tensor], mask: Tensor, filler: int) -> Tensor:
    """Unpadded rows (T_b,) laid into the true places of `mask`, (B, T), int64."""
    padded = torch.full(mask.shape, filler, dtype=torch.long)
    padded[mask] = torch.cat(list(values)).long()
    return padded
