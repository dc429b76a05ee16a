"""What a tokenizer is asked for, part by part: token ids that are at most so long.

Below `encoding`, which lays out rows. Any tokenizer of transformers will do, fast or slow.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cola.errors import ConfigError
from cola.tasks.rows import TokenRow

if TYPE_CHECKING:  # importing transformers costs seconds
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 10_000


def chunks(*columns: Sequence[str]) -> Iterator[list[Sequence[str]]]:
    """Parts of equally long columns: Python's lists of tokens take ten times the memory."""
    for start in range(0, len(columns[0]), CHUNK_ROWS):
        yield [column[start : start + CHUNK_ROWS] for column in columns]


def tokenize(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    is_target: bool = False,
) -> Iterator[tuple[TokenRow, int]]:
    """Rows of at most `max_length` tokens with their special tokens, and the tokens they lost."""
    columns = call_tokenizer(tokenizer, texts, is_target=is_target)
    lengths = [len(ids) for ids in columns["input_ids"]]
    # Only long rows pass twice; the tokenizer itself knows which special tokens to keep.
    if long := [index for index, length in enumerate(lengths) if length > max_length]:
        cut = call_tokenizer(
            tokenizer,
            [texts[index] for index in long],
            is_target=is_target,
            truncation=True,
            max_length=max_length,
        )
        for column, values in cut.items():
            for index, ids in zip(long, values, strict=True):
                columns[column][index] = ids
    for index, length in enumerate(lengths):
        row = {column: values[index] for column, values in columns.items()}
        yield row, length - len(row["input_ids"])


def call_tokenizer(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    is_target: bool = False,
    **options: Any,
) -> dict[str, list[list[int]]]:
    """The tokenizer's columns, without its warning that a text is longer than the model allows."""
    batch = {"text_target" if is_target else "text": list(texts)}
    return dict(tokenizer(**batch, return_attention_mask=False, verbose=False, **options))


def tokenize_prompts(
    prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """Prompts with the opening special tokens (Llama's BOS) but not the closing ones."""
    eos = tokenizer.eos_token_id
    encoded = call_tokenizer(tokenizer, prompts)["input_ids"]
    return [ids[:-1] if ids and ids[-1] == eos else ids for ids in encoded]


def end_of(prompt: list[int], room: int, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The last `room` tokens of a prompt, after its BOS: models such as Llama fail without one."""
    if len(prompt) <= room:
        return prompt
    opening = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    return opening + prompt[len(prompt) - room + len(opening) :]


def require_eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that ends every answer.

    Raises:
        ConfigError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token, which has to end every response")
    eos: int = tokenizer.eos_token_id
    return eos


def check_room(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
    """Refuse a length that special tokens alone fill.

    Raises:
        ConfigError: says how many there are.
    """
    special: int = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise ConfigError(
            f"task.max_length={max_length} has no room for text beside the tokenizer's {special} "
            "special tokens; raise it"
        )
