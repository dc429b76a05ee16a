"""Tokenised sets on disk, so that the second run of a large set starts at once.

A table is found by a hash over its texts, the tokenizer and the settings, so that a stale one
cannot be read. The cache is a convenience: whatever goes wrong with it, the set is encoded again.
Processes may race: files appear complete or not at all.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cola.tasks.rows import TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MIN_ROWS = 2000
"""Fewer rows are encoded faster than anybody notices."""

FORMAT = 1
"""Raised whenever tokenising or the layout of a file changes."""

_TOKENS, _LENGTHS = "tokens.", "lengths."


def cached_table(
    encode: Callable[[], TokenTable],
    *,
    texts: Sequence[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase",
    settings: Mapping[str, Any],
) -> TokenTable:
    """What `encode` returns, from the cache where it is there.

    Args:
        encode: tokenises `texts`.
        texts: columns of N strings.
        tokenizer: what `encode` uses.
        settings: everything else that decides the tokens; JSON values.
    """
    num_rows = len(texts[0])
    if num_rows < MIN_ROWS:
        return encode()
    path = cache_dir() / f"{_key(texts, tokenizer, settings)}.safetensors"
    table = _read(path, num_rows)
    if table is None:
        table = encode()
        _write(path, table)
    return table


def cache_dir() -> Path:
    """Folder of the cache: the variable COLA_CACHE, or `~/.cache/cola`."""
    given = os.environ.get("COLA_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "cola"


def _key(
    texts: Sequence[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase",
    settings: Mapping[str, Any],
) -> str:
    head = [FORMAT, dict(settings), _tokenizer_state(tokenizer)]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for column in texts:
        for text in column:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(data))  # else ["ab", "c"] would hash like ["a", "bc"]
            digest.update(data)
    return digest.hexdigest()


def _tokenizer_state(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Everything that decides a tokenizer's output, as JSON values."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, special, tokenizer.get_vocab()]
    state = json.loads(backend.to_str())
    # Leftovers of the previous call, not settings.
    state["truncation"] = state["padding"] = None
    return [type(tokenizer).__name__, special, state]


def _read(path: Path, num_rows: int) -> TokenTable | None:
    """The stored table; None where there is none that can be used."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            counts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        table = TokenTable(
            tokens=_named(tensors, _TOKENS),
            lengths=_named(tensors, _LENGTHS),
            cut_rows=int(counts["cut_rows"]),
            cut_tokens=int(counts["cut_tokens"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s cannot be read (%s); encoding again", path, error)
        return None
    if table.num_rows != num_rows:
        logger.warning("%s holds %d rows, not %d; encoding again", path, table.num_rows, num_rows)
        return None
    logger.debug("tokens of %d rows come from %s", num_rows, path)
    return table


def _write(path: Path, table: TokenTable) -> None:
    tensors = {_TOKENS + name: tensor for name, tensor in table.tokens.items()}
    tensors |= {_LENGTHS + name: tensor for name, tensor in table.lengths.items()}
    counts = {"cut_rows": str(table.cut_rows), "cut_tokens": str(table.cut_tokens)}
    draft = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(save(tensors, metadata=counts))
        draft.replace(path)
    except OSError as error:
        logger.warning("tokens are not cached: %s; COLA_CACHE names another folder", error)


def _named(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
