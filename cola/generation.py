"""Text from a model that writes: batched decoding of prompts, with the paper's settings.

Adapters act through the hooks on the base model (or inside its weights), so that generation sees
the very model that evaluation scores. Paper, Section 4: beams of 4 without repeated 3-grams for
encoder-decoders; greedy without repeated 2-grams, 40 tokens, for decoders.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cola.config.choices import Objective
from cola.config.schema import GenerationConfig
from cola.errors import ConfigError
from cola.task_data import Example, Problem, TaskData
from cola.user_rows import UserRows

if TYPE_CHECKING:
    import transformers

MAX_NEW_TOKENS = 40
"""New tokens of a decoder; an encoder-decoder writes at most `task.max_length`."""

_Key = tuple[int, tuple[int, ...]]
"""A user's position, or 0, and the tokens of a prompt: what is answered once."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is searched for; `GenerationConfig` with its nulls filled in.

    Attributes:
        max_new_tokens: the end-of-text token included.
        num_beams: 1 is greedy.
        no_repeat_ngram: longest n-gram that may not occur twice, 0 for none.
        batch_size: prompts at a time.
    """

    max_new_tokens: int
    num_beams: int
    no_repeat_ngram: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Texts in the order of their rows, and what they cost.

    Attributes:
        texts: without special tokens and outer blanks.
        num_tokens: new tokens over all distinct prompts, each text's end included.
        seconds: of the search alone.
    """

    texts: list[str]
    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second."""
        return self.num_tokens / max(self.seconds, 1e-9)


def resolve_decoding(config: GenerationConfig, problem: Problem) -> Decoding:
    """Fills in the paper's settings for the kind of model."""
    if problem.objective is Objective.seq2seq:
        paper = {"max_new_tokens": problem.max_length, "num_beams": 4, "no_repeat_ngram": 3}
    else:
        paper = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, "no_repeat_ngram": 2}
    given = {name: getattr(config, name) for name in paper}
    chosen = paper | {name: value for name, value in given.items() if value is not None}
    return Decoding(**chosen, batch_size=config.batch_size)


def check_positions(module: nn.Module, config: GenerationConfig, problem: Problem) -> None:
    """Refuses texts that would run past the model's last position, before any is written.

    Raises:
        ConfigError: the longest prompt and answer together do not fit.
    """
    limit = getattr(module.config, "max_position_embeddings", None)
    new = resolve_decoding(config, problem).max_new_tokens
    is_seq2seq = problem.objective is Objective.seq2seq
    before = 1 if is_seq2seq else problem.max_length  # a decoder of its own begins with one token
    if limit is None or before + new <= limit:
        return
    prompt = "the start token" if is_seq2seq else f"a prompt of task.max_length={before} tokens"
    raise ConfigError(
        f"generation.max_new_tokens={new} after {prompt} needs {before + new} positions, and the "
        f"model has {limit}; lower generation.max_new_tokens or task.max_length"
    )


@torch.no_grad()
def generate_texts(
    model: nn.Module,
    rows: Sequence[Example],
    task: TaskData,
    config: GenerationConfig,
    device: torch.device,
    *,
    owners: Sequence[int] | None = None,
    route: Callable[[UserRows | None], None] = lambda rows: None,
) -> Generated:
    """Writes an answer to the prompt of every row; a user's equal prompts are answered once.

    Args:
        model: in evaluation mode, adapted.
        rows: each with `prompt_ids` (T,).
        task: of a writing objective; pads prompts and turns tokens back into text.
        config: null settings are the paper's.
        device: the model's.
        owners: position of each row's user, where users have adapters of their own.
        route: told whose prompts come next; beams of a prompt lie side by side, in its place.
    """
    assert task.collate_prompts is not None
    assert task.tokenizer is not None
    decoding = resolve_decoding(config, task.problem)
    prompts = [tuple(row["prompt_ids"].tolist()) for row in rows]
    keys = list(zip(owners or [0] * len(prompts), prompts, strict=True))
    distinct = dict(zip(keys, rows, strict=True))
    # Prompts of like length share a batch; the longest first, where memory would run out.
    order = sorted(distinct, key=lambda key: len(key[1]), reverse=True)
    settings = _settings(model, task, decoding)
    texts: dict[_Key, str] = {}
    num_tokens = 0
    start = time.perf_counter()
    with _only(model, settings):
        for chunk in _chunks(order, decoding.batch_size):
            if owners is not None:
                chunk.sort(key=lambda key: key[0])
                route(UserRows.of([owner for owner, _ in chunk]))
            inputs = task.collate_prompts([distinct[key] for key in chunk])
            answers = _search(model, inputs, settings, task.problem.objective, device)
            num_tokens += sum(_length(answer, settings.eos_token_id) for answer in answers)
            decoded = task.tokenizer.batch_decode(answers, skip_special_tokens=True)
            texts |= {key: text.strip() for key, text in zip(chunk, decoded, strict=True)}
    return Generated(
        texts=[texts[key] for key in keys],
        num_tokens=num_tokens,
        seconds=time.perf_counter() - start,
    )


def _settings(model: Any, task: TaskData, decoding: Decoding) -> "transformers.GenerationConfig":
    """The whole of what decides the search.

    Token ids are facts of model and tokenizer. BART was trained to open every text with its begin
    token and loses its way without, so ids that a model forces are kept; whatever else its
    generation_config.json recommends is not.
    """
    import transformers

    tokenizer: Any = task.tokenizer
    facts = model.generation_config
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    build: Any = transformers.GenerationConfig  # its constructor is not typed
    settings: transformers.GenerationConfig = build(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=decoding.num_beams,
        early_stopping=True if decoding.num_beams > 1 else None,
        no_repeat_ngram_size=decoding.no_repeat_ngram,
        use_cache=True,  # built models have it off, for training
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=pad,
        # Padding counts among the n-grams: a text that held a pad would depend on its batch.
        suppress_tokens=None if pad == end else [pad],
        decoder_start_token_id=facts.decoder_start_token_id,
        forced_bos_token_id=facts.forced_bos_token_id,
        forced_eos_token_id=facts.forced_eos_token_id,
    )
    return settings


@contextmanager
def _only(model: Any, settings: "transformers.GenerationConfig") -> Iterator[None]:
    """Nothing but these settings: transformers fills in what is unset from the model's own."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _search(
    model: Any,
    inputs: dict[str, Tensor],
    settings: "transformers.GenerationConfig",
    objective: Objective,
    device: torch.device,
) -> list[list[int]]:
    """New tokens of each prompt, padded behind their end."""
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    tokens = model.generate(**moved, generation_config=settings)  # (B, T)
    # A decoder repeats its prompt; an encoder-decoder begins with its start token.
    skipped = 1 if objective is Objective.seq2seq else inputs["input_ids"].shape[1]
    answers: list[list[int]] = tokens[:, skipped:].tolist()
    return answers


def _length(answer: list[int], end: int) -> int:
    return answer.index(end) + 1 if end in answer else len(answer)


def _chunks(keys: list[_Key], size: int) -> Iterator[list[_Key]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))
