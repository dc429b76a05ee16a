"""Tokenised sets on disk: found again, never stale, never in the way."""

import logging
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from cola.tasks import cache
from cola.tasks.cache import cache_dir, cached_table
from cola.tasks.encoding import encode_responses
from cola.tasks.rows import EncodedRows, TokenTable, build_table
from tests.byte_tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = ["a fox", "a deer", "an ibex that is far too long"]


@pytest.fixture(scope="module")
def tokenizer() -> "PreTrainedTokenizerBase":
    return byte_tokenizer(marks_ends=False)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_ROWS", 1)
    return tmp_path / "cache"


class Encoder:
    """Counts how often it is asked to encode."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> TokenTable:
        self.calls += 1
        rows = [({"input_ids": list(text.encode())[:9]}, max(0, len(text) - 9)) for text in TEXTS]
        return build_table(rows)


def look_up(
    tokenizer: "PreTrainedTokenizerBase",
    encoder: Encoder,
    texts: list[list[str]] | None = None,
    **settings: Any,
) -> TokenTable:
    return cached_table(encoder, texts=texts or [TEXTS], tokenizer=tokenizer, settings=settings)


def test_second_time_comes_from_the_cache(tokenizer: "PreTrainedTokenizerBase") -> None:
    encoder = Encoder()
    first, second = look_up(tokenizer, encoder), look_up(tokenizer, encoder)
    assert encoder.calls == 1
    assert (second.cut_rows, second.cut_tokens) == (first.cut_rows, first.cut_tokens) == (1, 19)
    assert second.tokens["input_ids"].dtype == torch.int32
    for name in ("tokens", "lengths"):
        found, wanted = getattr(second, name), getattr(first, name)
        assert found.keys() == wanted.keys()
        assert torch.equal(found["input_ids"], wanted["input_ids"])


def test_small_sets_are_not_cached(
    tokenizer: "PreTrainedTokenizerBase", folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MIN_ROWS", 4)
    look_up(tokenizer, Encoder())
    assert not folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"texts": [["a fox", "a deer", "an ibex"]]},
        {"texts": [["a foxa", " deer", "an ibex that is far too long"]]},
        {"texts": [TEXTS, TEXTS]},
        {"max_length": 8},
    ],
)
def test_other_texts_and_settings_are_encoded(
    tokenizer: "PreTrainedTokenizerBase", change: dict[str, Any]
) -> None:
    encoder = Encoder()
    look_up(tokenizer, encoder)
    look_up(tokenizer, encoder, **change)
    assert encoder.calls == 2


def test_other_tokenizers_are_told_apart(tokenizer: "PreTrainedTokenizerBase") -> None:
    encoder = Encoder()
    ending_in_bos: Any = byte_tokenizer(marks_ends=False)
    ending_in_bos.eos_token = "<s>"
    others = [byte_tokenizer(marks_ends=True), ending_in_bos]
    for number, other in enumerate([tokenizer, *others], start=1):
        look_up(other, encoder)
        assert encoder.calls == number


def test_key_ignores_what_a_call_left_in_the_tokenizer() -> None:
    own, encoder = byte_tokenizer(marks_ends=False), Encoder()
    look_up(own, encoder)
    own(["a fox"], truncation=True, max_length=3, padding=True)
    look_up(own, encoder)
    assert encoder.calls == 1


def test_slow_tokenizers_are_known_by_their_vocabulary() -> None:
    encoder = Encoder()
    for word, calls in (("fox", 1), ("fox", 1), ("deer", 2)):
        slow: Any = SimpleNamespace(special_tokens_map={}, get_vocab=lambda word=word: {word: 0})
        look_up(slow, encoder)
        assert encoder.calls == calls


@pytest.mark.parametrize("damage", ["garbage", "truncated", "no metadata", "fewer rows"])
def test_broken_file_is_encoded_again_and_replaced(
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = Encoder()
    look_up(tokenizer, encoder)
    (path,) = folder.iterdir()
    if damage == "garbage":
        path.write_bytes(b"hello")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        from safetensors.torch import save_file

        counts = {"cut_rows": "0", "cut_tokens": "0"}
        row = torch.tensor([1], dtype=torch.int32)
        save_file(
            {"tokens.input_ids": row, "lengths.input_ids": row.clone()},
            path,
            metadata=None if damage == "no metadata" else counts,
        )
    assert look_up(tokenizer, encoder).num_rows == 3
    assert "encoding again" in caplog.text
    look_up(tokenizer, encoder)
    assert encoder.calls == 2


def test_folder_that_cannot_be_written_is_no_error(
    tokenizer: "PreTrainedTokenizerBase",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COLA_CACHE", str(tmp_path / "file"))
    assert look_up(tokenizer, Encoder()).num_rows == 3
    assert "tokens are not cached" in caplog.text
    assert "COLA_CACHE names another folder" in caplog.text


def test_interrupted_write_leaves_nothing_that_is_read(
    tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> None:
    encoder = Encoder()
    with (
        mock.patch.object(Path, "replace", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        look_up(tokenizer, encoder)
    assert not list(folder.glob("*.safetensors"))
    look_up(tokenizer, encoder)
    assert encoder.calls == 2


def _race(texts: list[str]) -> int:
    table = look_up(byte_tokenizer(marks_ends=False), Encoder(), [texts])
    return int(table.tokens["input_ids"].sum())


@pytest.mark.slow
def test_processes_may_race(folder: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert len(set(pool.map(_race, [TEXTS] * 16))) == 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("given", ["", None])
def test_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    if given is None:
        monkeypatch.delenv("COLA_CACHE")
    else:
        monkeypatch.setenv("COLA_CACHE", given)
    assert cache_dir() == Path.home() / ".cache" / "cola"


def test_cached_rows_are_those_that_were_encoded_and_log_the_same_line(
    tokenizer: "PreTrainedTokenizerBase", caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cola.tasks.encoding")
    runs = []
    for _ in range(2):
        rows = encode_responses(
            TEXTS, ["x", "y", "z"], tokenizer=tokenizer, max_length=12, name="s", with_prompts=True
        )
        runs.append([{name: ids.tolist() for name, ids in row.items()} for row in rows])
    assert runs[0] == runs[1]
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second
    assert "1 of 3 rows are too long for task.max_length=12" in first


# --- rows


@pytest.fixture
def rows() -> EncodedRows:
    table = build_table(
        [({"input_ids": [1, 2]}, 0), ({"input_ids": []}, 0), ({"input_ids": [3]}, 2)]
    )
    return EncodedRows(table, {"label": [7, 8, 9]})


def test_rows_are_a_sequence_of_views(rows: EncodedRows) -> None:
    assert len(rows) == 3
    assert [row["input_ids"].tolist() for row in rows] == [[1, 2], [], [3]]
    assert rows[-1]["label"] == 9
    assert [row["label"] for row in rows[1:]] == [8, 9]
    first = rows[0]["input_ids"]
    assert first.untyped_storage().data_ptr() == rows[2]["input_ids"].untyped_storage().data_ptr()
    with pytest.raises(IndexError):
        rows[3]


def test_rows_take_further_values(rows: EncodedRows) -> None:
    more = rows.with_values({"user": ["a", "b", "c"]})
    assert (more[1]["label"], more[1]["user"]) == (8, "b")
    assert "user" not in rows[1]
