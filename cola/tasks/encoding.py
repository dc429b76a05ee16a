"""Text to token ids, once and up front; rows stay unpadded until they are collated.

Second stage of every text task, after `sources` and before `collate`. The attention mask is not
stored: every token of an unpadded row is real.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cola.config.schema import TaskConfig
from cola.errors import ConfigError
from cola.task_data import Problem, Score
from cola.tasks.bad_rows import BadRows
from cola.tasks.cache import cached_table
from cola.tasks.rows import EncodedRows, TokenRow, build_table
from cola.tasks.tokenizing import (
    call_tokenizer,
    check_room,
    chunks,
    end_of,
    require_eos,
    tokenize,
    tokenize_prompts,
)

if TYPE_CHECKING:  # importing transformers costs seconds
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that no loss term scores (the convention of torch's cross_entropy)."""


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """What a task's loader is given: the arguments of `load_task`, and what becomes of bad rows."""

    task: TaskConfig
    problem: Problem
    tokenizer: "PreTrainedTokenizerBase | None"
    score: Score
    data_dir: str | None
    split_seed: int
    bad_rows: BadRows
    decoder_start_id: int | None = None
    user_column: str | None = None


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
    name: str,
) -> EncodedRows:
    """Rows for classification or regression; a row that is too long loses its end.

    Args:
        texts: one string per row.
        labels: one class or value per row.
        tokenizer: adds its special tokens.
        max_length: tokens kept of a row, special tokens included.
        name: the set and split, for the log.

    Returns:
        Rows with `input_ids` (T,), `label`, and `token_type_ids` (T,) if the tokenizer gives them.

    Raises:
        ConfigError: `max_length` has no room for text.
    """
    check_room(tokenizer, max_length)

    def rows() -> Iterator[tuple[TokenRow, int]]:
        for (part,) in chunks(texts):
            yield from tokenize(part, tokenizer, max_length)

    settings = {"form": "text", "max_length": max_length}
    encoded = _encode(rows, [texts], tokenizer, settings, name)
    return encoded.with_values({"label": labels})


def encode_pairs(
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    name: str,
    with_prompts: bool,
) -> EncodedRows:
    """Rows for encoder-decoders; sources and targets that are too long lose their end.

    Labels are the target as the tokenizer marks it, which for BART opens with `<s>`: its decoder
    was trained to write that first. The closing EOS is kept, whatever is cut.

    Args:
        sources: what the encoder reads.
        targets: what the decoder writes.
        tokenizer: adds its special tokens.
        max_length: tokens kept of a source, and of a target.
        name: the set and split, for the log.
        with_prompts: adds `prompt_ids`, which are the `input_ids`.

    Returns:
        Rows with `input_ids` (S,) and `labels` (T,), not shifted.

    Raises:
        ConfigError: the tokenizer has no EOS token, or `max_length` has no room for text.
    """
    eos = require_eos(tokenizer)
    check_room(tokenizer, max_length)

    def rows() -> Iterator[tuple[TokenRow, int]]:
        for part, answers in chunks(sources, targets):
            for (source, lost), (target, lost_of_target) in zip(
                tokenize(part, tokenizer, max_length),
                tokenize(answers, tokenizer, max_length, is_target=True),
                strict=True,
            ):
                labels, ids = target["input_ids"], source["input_ids"]
                if not labels or labels[-1] != eos:
                    kept = labels[: max_length - 1]
                    lost += len(labels) - len(kept)
                    labels = [*kept, eos]
                row: dict[str, Sequence[int]] = {"input_ids": ids, "labels": labels}
                yield row | ({"prompt_ids": ids} if with_prompts else {}), lost + lost_of_target

    settings = {"form": "pair", "max_length": max_length, "with_prompts": with_prompts}
    return _encode(rows, [sources, targets], tokenizer, settings, name)


def encode_responses(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    name: str,
    with_prompts: bool,
) -> EncodedRows:
    """Rows for causal models: prompt, response and EOS; only the latter two are scored.

    A row that is too long loses the beginning of its prompt first (never an opening BOS), and the
    end of its response only once one prompt token is left, so that every row keeps a scored token.

    Args:
        prompts: what the model is given.
        responses: what it continues them with.
        tokenizer: adds its opening special tokens.
        max_length: tokens kept of a row.
        name: the set and split, for the log.
        with_prompts: adds `prompt_ids`, the whole prompt, whose beginning is cut to `max_length`.

    Returns:
        Rows with `input_ids` and `labels`, both (T,), T <= max_length.

    Raises:
        ConfigError: the tokenizer has no EOS token, or `max_length` has no room for a response.
    """
    eos = require_eos(tokenizer)
    if max_length < 2:
        raise ConfigError(f"task.max_length={max_length}; a prompt and a response need >= 2 tokens")

    def rows() -> Iterator[tuple[TokenRow, int]]:
        for part, answers in chunks(prompts, responses):
            for prompt, response in zip(
                tokenize_prompts(part, tokenizer),
                call_tokenizer(tokenizer, answers, add_special_tokens=False)["input_ids"],
                strict=True,
            ):
                scored = [*response, eos][: max_length - 1]
                kept = end_of(prompt, max_length - len(scored), tokenizer)
                row = {"input_ids": kept + scored, "labels": [IGNORED] * len(kept) + scored}
                if with_prompts:
                    row["prompt_ids"] = end_of(prompt, max_length, tokenizer)
                yield row, len(prompt) + len(response) + 1 - len(kept) - len(scored)

    settings = {"form": "response", "max_length": max_length, "with_prompts": with_prompts}
    return _encode(rows, [prompts, responses], tokenizer, settings, name)


def _encode(
    rows: Callable[[], Iterator[tuple[TokenRow, int]]],
    texts: Sequence[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase",
    settings: Mapping[str, Any],
    name: str,
) -> EncodedRows:
    """Rows from the cache or the tokenizer; says what the length limit cost."""
    table = cached_table(
        lambda: build_table(rows()), texts=texts, tokenizer=tokenizer, settings=settings
    )
    if table.cut_rows:
        logger.info(
            "%s: %d of %d rows are too long for task.max_length=%d and lost %d tokens",
            name,
            table.cut_rows,
            table.num_rows,
            settings["max_length"],
            table.cut_tokens,
        )
    return EncodedRows(table, {})
