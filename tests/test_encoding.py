"""Text to token ids: what is cut, what is scored, what is given."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from cola.errors import ConfigError
from cola.tasks import tokenizing
from cola.tasks.encoding import encode_pairs, encode_responses, encode_texts
from cola.tasks.rows import EncodedRows
from tests.byte_tokenizer import BEGIN, END, byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = -100


@pytest.fixture(scope="module")
def marking() -> "PreTrainedTokenizerBase":
    return byte_tokenizer(marks_ends=True)


@pytest.fixture(scope="module")
def plain() -> "PreTrainedTokenizerBase":
    return byte_tokenizer(marks_ends=False)


@pytest.fixture(scope="module")
def opening() -> "PreTrainedTokenizerBase":
    """Like Llama's: opens a text with BOS, and does not close it."""
    from tokenizers import processors

    tokenizer: Any = byte_tokenizer(marks_ends=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    return tokenizer


def texts(tokenizer: "PreTrainedTokenizerBase", *values: str, max_length: int) -> EncodedRows:
    return encode_texts(
        values, [0] * len(values), tokenizer=tokenizer, max_length=max_length, name="set (train)"
    )


def pair(
    tokenizer: "PreTrainedTokenizerBase", source: str, target: str, *, max_length: int = 99
) -> dict[str, str]:
    rows = encode_pairs(
        [source],
        [target],
        tokenizer=tokenizer,
        max_length=max_length,
        name="set (test)",
        with_prompts=True,
    )
    return decoded(tokenizer, rows)


def response(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, answer: str, *, max_length: int = 99
) -> dict[str, str]:
    rows = encode_responses(
        [prompt],
        [answer],
        tokenizer=tokenizer,
        max_length=max_length,
        name="set (test)",
        with_prompts=True,
    )
    return decoded(tokenizer, rows)


def decoded(tokenizer: "PreTrainedTokenizerBase", rows: EncodedRows) -> dict[str, str]:
    (row,) = rows
    return {
        name: tokenizer.decode([token for token in ids.tolist() if token != NONE])
        for name, ids in row.items()
    }


def test_texts_are_cut_at_their_end_and_keep_the_closing_token(
    marking: "PreTrainedTokenizerBase",
) -> None:
    rows = texts(marking, "fox", "a long fox", max_length=6)
    assert [marking.decode(row["input_ids"]) for row in rows] == ["<s>fox</s>", "<s>a lo</s>"]


def test_pair_scores_the_target_and_gives_the_source(marking: "PreTrainedTokenizerBase") -> None:
    assert pair(marking, "fox?", "deer") == {
        "input_ids": "<s>fox?</s>",
        "labels": "<s>deer</s>",
        "prompt_ids": "<s>fox?</s>",
    }


def test_pair_that_is_too_long_keeps_both_beginnings_and_eos(
    marking: "PreTrainedTokenizerBase",
) -> None:
    row = pair(marking, "where is the fox?", "it is over there", max_length=8)
    assert (row["input_ids"], row["labels"]) == ("<s>where </s>", "<s>it is </s>")


@pytest.mark.parametrize(
    ("max_length", "labels"), [(99, "deer</s>"), (4, "dee</s>"), (5, "deer</s>")]
)
def test_target_gets_an_eos_that_the_tokenizer_does_not_add(
    plain: "PreTrainedTokenizerBase", max_length: int, labels: str
) -> None:
    assert pair(plain, "fox", "deer", max_length=max_length)["labels"] == labels


def test_response_scores_the_answer_and_eos_alone(plain: "PreTrainedTokenizerBase") -> None:
    assert response(plain, "fox? ", "deer") == {
        "input_ids": "fox? deer</s>",
        "labels": "deer</s>",
        "prompt_ids": "fox? ",
    }


def test_prompt_keeps_its_opening_token_and_loses_a_closing_one(
    marking: "PreTrainedTokenizerBase",
) -> None:
    row = response(marking, "fox?", "deer")
    assert (row["input_ids"], row["prompt_ids"]) == ("<s>fox?deer</s>", "<s>fox?")


def test_long_row_loses_the_beginning_of_its_prompt(plain: "PreTrainedTokenizerBase") -> None:
    row = response(plain, "where is the fox? ", "deer", max_length=10)
    assert (row["input_ids"], row["labels"]) == ("fox? deer</s>", "deer</s>")
    assert row["prompt_ids"] == " the fox? "


def test_cut_prompt_keeps_its_bos(opening: "PreTrainedTokenizerBase") -> None:
    row = response(opening, "where is the fox? ", "deer", max_length=10)
    assert row["input_ids"] == "<s>ox? deer</s>"
    assert row["prompt_ids"] == "<s>the fox? "


def test_long_response_loses_its_end_and_keeps_one_prompt_token(
    plain: "PreTrainedTokenizerBase",
) -> None:
    row = response(plain, "fox?", "deer and ibex", max_length=5)
    assert (row["input_ids"], row["labels"]) == ("?deer", "deer")


@pytest.mark.parametrize("encode", [encode_pairs, encode_responses])
def test_rows_that_are_learned_from_carry_no_prompt(
    encode: Callable[..., EncodedRows], plain: "PreTrainedTokenizerBase"
) -> None:
    rows = encode(["a"], ["b"], tokenizer=plain, max_length=9, name="s", with_prompts=False)
    assert set(rows[0]) == {"input_ids", "labels"}


@pytest.mark.parametrize("size", [1, 3])
def test_parts_of_a_set_are_joined_in_order(
    plain: "PreTrainedTokenizerBase", size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "CHUNK_ROWS", size)
    words = [f"word {i}" for i in range(7)]
    rows = encode_responses(
        words, words, tokenizer=plain, max_length=99, name="s", with_prompts=False
    )
    assert [plain.decode(row["input_ids"]) for row in rows] == [f"{w}{w}</s>" for w in words]


# --- what the length limit costs


@pytest.mark.parametrize(
    ("encode", "marks_ends", "lost"),
    [
        (encode_pairs, True, 3 + 1),  # a source of 11 tokens and a target of 9
        (encode_responses, False, 9),  # a row of 9 + 7 + 1 tokens
    ],
)
def test_what_is_dropped_is_counted_and_logged_once(
    encode: Callable[..., EncodedRows],
    marks_ends: bool,
    lost: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="cola.tasks.encoding")
    encode(
        ["fox", "the fox !"],
        ["abc", "the fox"],
        tokenizer=byte_tokenizer(marks_ends=marks_ends),
        max_length=8,
        name="samsum (train)",
        with_prompts=False,
    )
    (record,) = caplog.records
    assert record.getMessage() == (
        f"samsum (train): 1 of 2 rows are too long for task.max_length=8 and lost {lost} tokens"
    )


def test_nothing_is_logged_where_nothing_is_dropped(
    marking: "PreTrainedTokenizerBase", caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cola.tasks.encoding")
    texts(marking, "fox", max_length=5)
    assert not caplog.records


def test_no_warning_of_the_tokenizer_about_what_is_cut_anyway(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer: Any = byte_tokenizer(marks_ends=True, model_max_length=4)
    texts(tokenizer, "a long fox", max_length=4)
    assert "longer than the specified maximum" not in caplog.text


# --- what cannot be encoded


@pytest.mark.parametrize("encode", [encode_pairs, encode_responses])
def test_tokenizer_without_eos_is_refused(encode: Callable[..., EncodedRows]) -> None:
    tokenizer: Any = byte_tokenizer(marks_ends=False)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no EOS token, which has to end every response"):
        encode(["a"], ["b"], tokenizer=tokenizer, max_length=9, name="s", with_prompts=False)


def test_length_without_room_for_text_is_refused(marking: "PreTrainedTokenizerBase") -> None:
    with pytest.raises(ConfigError, match=r"task\.max_length=2 has no room.* 2 special tokens"):
        texts(marking, "fox", max_length=2)
    with pytest.raises(ConfigError, match=r"task\.max_length=2 has no room"):
        pair(marking, "fox", "deer", max_length=2)
    with pytest.raises(ConfigError, match=r"task\.max_length=1; a prompt and a response need >= 2"):
        response(marking, "fox", "deer", max_length=1)


def test_ends_are_those_of_the_tokenizer(marking: "PreTrainedTokenizerBase") -> None:
    (row,) = texts(marking, "f", max_length=9)
    ids = row["input_ids"].tolist()
    assert (ids[0], ids[-1]) == (BEGIN, END)
