"""Text to token ids, once and up front; rows stay unpadded until they are collated.

Second stage of every text task, after `sources` and before `collate`. The attention mask is not
stored: every token of an unpadded row is real.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cola.config.choices import Objective
from cola.config.schema import TaskConfig
from cola.errors import ConfigError, DataError
from cola.interfaces import Example, Problem, Score

if TYPE_CHECKING:  # importing transformers costs seconds
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that no loss term scores (the convention of torch's cross_entropy)."""


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """What a task's loader is given; the fields are the arguments of `load_task`."""

    task: TaskConfig
    problem: Problem
    tokenizer: "PreTrainedTokenizerBase | None"
    score: Score
    data_dir: str | None
    split_seed: int


def require_tokenizer(request: TaskRequest) -> "PreTrainedTokenizerBase":
    """The request's tokenizer.

    Raises:
        ConfigError: the model has none.
    """
    if request.tokenizer is None:
        raise ConfigError(
            f"task={request.task.name} holds text, but the model has no tokenizer; "
            "choose a text model, e.g. model=roberta-base or model=tiny-roberta"
        )
    return request.tokenizer


def encode_texts(
    texts: Sequence[str],
    labels: Sequence[float],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> list[dict[str, Any]]:
    """Rows for classification or regression.

    Args:
        texts: one string per row.
        labels: one class or value per row.
        tokenizer: adds its special tokens.
        max_length: tokens kept of a row, special tokens included.

    Returns:
        Rows with `input_ids` (T,) int64, `label`, and `token_type_ids` (T,) if the tokenizer
        gives them.
    """
    encoded = tokenizer(
        list(texts), truncation=True, max_length=max_length, return_attention_mask=False
    )
    return [
        {name: torch.tensor(values[index]) for name, values in encoded.items()} | {"label": label}
        for index, label in enumerate(labels)
    ]


def encode_responses(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> list[dict[str, Any]]:
    """Rows for causal models: prompt, response and EOS; only the latter two are scored.

    A row that is too long loses the beginning of its prompt first, and the end of its response
    only once one prompt token is left, so that every row keeps a scored token.

    Returns:
        Rows with `input_ids` and `labels`, both (T,) int64, T <= max_length.

    Raises:
        ConfigError: the tokenizer has no EOS token, or `max_length` has no room for a response.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token, which has to end every response")
    if max_length < 2:
        raise ConfigError(f"task.max_length={max_length}; a prompt and a response need >= 2 tokens")
    prompt_ids = _prompt_ids(prompts, tokenizer)
    response_ids = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    rows = []
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        scored = [*response, tokenizer.eos_token_id][: max_length - 1]
        kept = prompt[-(max_length - len(scored)) :]
        labels = [IGNORED] * len(kept) + scored
        rows.append({"input_ids": torch.tensor(kept + scored), "labels": torch.tensor(labels)})
    return rows


def check_labels(rows: Sequence[Example], problem: Problem, name: str) -> None:
    """Refuse labels that the loss cannot take, before they become an index error in it.

    Args:
        rows: each with a `label`.
        problem: how many classes there are, or that labels are values.
        name: the set and split, for the message.

    Raises:
        DataError: names the first bad row, counted from 1.
    """
    for number, row in enumerate(rows, start=1):
        label = row["label"]
        if problem.objective is Objective.regression:
            good, allowed = _is_number(label), "a finite number"
        else:
            good = isinstance(label, int) and 0 <= label < problem.num_labels
            allowed = f"a class from 0 to {problem.num_labels - 1}"
        if not good:
            raise DataError(f"{name}, row {number}: label {label!r} is not {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _prompt_ids(prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Prompts with the opening special tokens (Llama's BOS) but not the closing ones."""
    eos = tokenizer.eos_token_id
    encoded: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    return [ids[:-1] if ids[-1] == eos else ids for ids in encoded]
