"""Batches: padding, masks, labels that are scored, and their number."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cola.config.choices import Objective, Padding
from cola.config.schema import TaskConfig
from cola.errors import ConfigError
from cola.sites import RowStream
from cola.tasks.collate import (
    CausalCollator,
    PairCollator,
    PromptCollator,
    TextCollator,
    build_prompt_collator,
    build_text_collator,
    collate_images,
)

PAD = 9


def text_rows(lengths: list[int], *, types: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, length in enumerate(lengths):
        row: dict[str, Any] = {"input_ids": torch.arange(1, length + 1), "label": number % 2}
        if types:
            row["token_type_ids"] = torch.ones(length, dtype=torch.long)
        rows.append(row | {"category": "open_qa"})
    return rows


def causal_rows(shapes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Rows of (prompt, response) tokens."""
    rows = []
    for prompt, response in shapes:
        ids = torch.arange(1, prompt + response + 1)
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def text_collator(*, length: int | None = None, dtype: torch.dtype = torch.long) -> TextCollator:
    return TextCollator(pad_id=PAD, pad_type_id=0, length=length, label_dtype=dtype)


def test_text_dynamic_pads_right_to_longest_row() -> None:
    batch = text_collator()(text_rows([2, 3]))
    assert batch.inputs["input_ids"].tolist() == [[1, 2, PAD], [1, 2, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.num_terms == 2


def test_text_max_length_pads_to_fixed_length() -> None:
    batch = text_collator(length=5)(text_rows([2, 3]))
    assert batch.inputs["input_ids"].shape == (2, 5)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [2, 3]


def test_text_token_types_are_padded_when_given() -> None:
    batch = text_collator()(text_rows([1, 2], types=True))
    assert batch.inputs["token_type_ids"].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_text_labels_have_the_objectives_dtype(dtype: torch.dtype) -> None:
    labels = text_collator(dtype=dtype)(text_rows([1, 1])).labels
    assert labels.dtype == dtype
    assert labels.tolist() == [0, 1]


def test_causal_pads_left_with_positions_of_the_mask() -> None:
    batch = CausalCollator(pad_id=PAD, length=None)(causal_rows([(1, 1), (2, 2)]))
    assert batch.inputs["input_ids"].tolist() == [[PAD, PAD, 1, 2], [1, 2, 3, 4]]
    assert batch.inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch.inputs["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert batch.labels.tolist() == [[-100, -100, -100, 2], [-100, -100, 3, 4]]


@pytest.mark.parametrize("length", [None, 6])
def test_causal_first_real_token_is_never_scored(length: int | None) -> None:
    rows = causal_rows([(0, 2), (0, 4)])  # no prompt: the first token carries a label
    batch = CausalCollator(pad_id=PAD, length=length)(rows)
    predicted_at_pad = batch.inputs["attention_mask"][:, :-1] == 0
    assert (batch.labels[:, 1:][predicted_at_pad] == -100).all()
    first = batch.inputs["attention_mask"].argmax(dim=1)
    assert batch.labels.gather(1, first[:, None]).tolist() == [[-100], [-100]]


@pytest.mark.parametrize("length", [None, 8])
def test_causal_collator_leaves_the_rows_untouched(length: int | None) -> None:
    rows = causal_rows([(0, 2)])
    CausalCollator(pad_id=PAD, length=length)(rows)
    assert rows[0]["labels"].tolist() == [1, 2]


@pytest.mark.parametrize("shapes", [[(3, 2)], [(0, 2), (3, 1)], [(0, 4), (0, 1)]])
def test_causal_num_terms_is_cross_entropys_count(shapes: list[tuple[int, int]]) -> None:
    batch = CausalCollator(pad_id=PAD, length=None)(causal_rows(shapes))
    targets = batch.labels[:, 1:].flatten()
    logits = torch.zeros(len(targets), 12)
    total = functional.cross_entropy(logits, targets, reduction="sum")
    mean = functional.cross_entropy(logits, targets, reduction="mean")
    assert batch.num_terms == pytest.approx(float(total / mean))


def pair_rows(shapes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Rows of (source, target) tokens, int32 as encoded sets hold them."""
    return [
        {
            "input_ids": torch.arange(1, source + 1, dtype=torch.int32),
            "labels": torch.arange(1, target + 1, dtype=torch.int32),
        }
        for source, target in shapes
    ]


def test_pair_pads_right_and_shifts_what_the_decoder_reads() -> None:
    batch = PairCollator(pad_id=PAD, start_id=7, length=None)(pair_rows([(1, 3), (2, 1)]))
    assert batch.inputs["input_ids"].tolist() == [[1, PAD], [1, 2]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[7, 1, 2], [7, 1, PAD]]
    assert batch.labels.tolist() == [[1, 2, 3], [1, -100, -100]]
    assert set(batch.inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert all(tensor.dtype == torch.long for tensor in (*batch.inputs.values(), batch.labels))


@pytest.mark.slow  # importing a model takes seconds
def test_pair_decoder_ids_are_what_transformers_shifts() -> None:
    from transformers.models.bart.modeling_bart import shift_tokens_right

    batch = PairCollator(pad_id=PAD, start_id=7, length=5)(pair_rows([(1, 3), (2, 5)]))
    expected = shift_tokens_right(batch.labels, pad_token_id=PAD, decoder_start_token_id=7)
    assert torch.equal(batch.inputs["decoder_input_ids"], expected)


def test_pair_max_length_pads_both_sides() -> None:
    batch = PairCollator(pad_id=PAD, start_id=7, length=4)(pair_rows([(1, 3)]))
    assert batch.inputs["input_ids"].shape == batch.labels.shape == (1, 4)


def test_pair_num_terms_is_cross_entropys_count() -> None:
    batch = PairCollator(pad_id=PAD, start_id=7, length=6)(pair_rows([(4, 3), (1, 5)]))
    assert batch.num_terms == int((batch.labels != -100).sum()) == 8


@pytest.mark.parametrize(
    ("is_left", "ids", "mask"),
    [
        (True, [[PAD, 1], [1, 2]], [[0, 1], [1, 1]]),
        (False, [[1, PAD], [1, 2]], [[1, 0], [1, 1]]),
    ],
)
def test_prompts_are_padded_where_the_model_does_not_go_on(
    is_left: bool, ids: list[list[int]], mask: list[list[int]]
) -> None:
    rows = [{"prompt_ids": torch.arange(1, n + 1, dtype=torch.int32)} for n in (1, 2)]
    batch = PromptCollator(pad_id=PAD, is_left=is_left)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": ids,
        "attention_mask": mask,
    }


def test_terms_are_counted_row_by_row() -> None:
    """What the loss scores of each row, by the labels themselves."""
    causal = CausalCollator(pad_id=PAD, length=None)(causal_rows([(0, 4), (3, 1), (0, 1)]))
    assert causal.row_terms is not None
    assert causal.row_terms.tolist() == [3, 1, 0]  # the first token of a row has no prediction
    assert causal.row_terms.tolist() == (causal.labels[:, 1:] != -100).sum(dim=1).tolist()
    pair = PairCollator(pad_id=PAD, start_id=7, length=6)(pair_rows([(4, 3), (1, 5)]))
    text = text_collator()(text_rows([2, 3, 1]))
    images = collate_images([{"pixels": torch.zeros(1, 2, 2), "label": 0}] * 2)
    for batch, wanted in ((pair, [3, 5]), (text, [1, 1, 1]), (images, [1, 1])):
        assert batch.row_terms is not None
        assert batch.row_terms.tolist() == wanted
    for batch in (causal, pair, text, images):
        assert batch.row_terms is not None
        assert batch.row_terms.dtype == torch.int64
        assert batch.num_terms == batch.row_terms.sum()


@pytest.mark.parametrize("length", [None, 6])
def test_batches_know_where_they_are_padded(length: int | None) -> None:
    text = text_collator(length=length)(text_rows([2, 5]))
    causal = CausalCollator(pad_id=PAD, length=length)(causal_rows([(0, 2), (3, 2)]))
    pair = PairCollator(pad_id=PAD, start_id=7, length=length)(pair_rows([(4, 3), (1, 5)]))
    for batch in (text, causal, pair):
        found = batch.row_masks[RowStream.inputs]
        assert found.dtype == torch.bool
        assert torch.equal(found.long(), batch.inputs["attention_mask"])
    assert text.row_masks.keys() == causal.row_masks.keys() == {RowStream.inputs}
    assert torch.equal(pair.row_masks[RowStream.targets], pair.labels != -100)
    assert collate_images([{"pixels": torch.zeros(1, 2, 2), "label": 0}]).row_masks == {}


def test_image_collator_stacks_pixels() -> None:
    batch = collate_images(
        [{"pixels": torch.full((1, 2, 2), float(i)), "label": i} for i in (3, 4)]
    )
    assert batch.inputs["pixels"].shape == (2, 1, 2, 2)
    assert batch.inputs["pixels"].dtype == torch.float32
    assert batch.labels.tolist() == [3, 4]
    assert batch.num_terms == 2


def test_build_text_collator_follows_objective_and_padding() -> None:
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=3, pad_token_type_id=0)
    task = TaskConfig(max_length=7, padding=Padding.max_length)
    regression = build_text_collator(task, Objective.regression, tokenizer)
    assert isinstance(regression, TextCollator)
    assert (regression.length, regression.label_dtype) == (7, torch.float32)
    causal = build_text_collator(TaskConfig(), Objective.causal, tokenizer)
    assert causal == CausalCollator(pad_id=0, length=None)
    pair = build_text_collator(task, Objective.seq2seq, tokenizer, decoder_start_id=5)
    assert pair == PairCollator(pad_id=0, start_id=5, length=7)
    for objective, is_left in ((Objective.causal, True), (Objective.seq2seq, False)):
        prompts = build_prompt_collator(objective, tokenizer)
        assert prompts == PromptCollator(pad_id=0, is_left=is_left)


def test_encoder_decoder_without_a_start_token_is_refused() -> None:
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=3, pad_token_type_id=0)
    with pytest.raises(ConfigError, match="no decoder_start_token_id"):
        build_text_collator(TaskConfig(), Objective.seq2seq, tokenizer)


def test_build_text_collator_pads_with_eos_without_a_pad_token() -> None:
    tokenizer: Any = SimpleNamespace(pad_token_id=None, eos_token_id=3, pad_token_type_id=0)
    assert build_text_collator(TaskConfig(), Objective.causal, tokenizer).pad_id == 3


def test_build_text_collator_refuses_a_tokenizer_without_either() -> None:
    tokenizer: Any = SimpleNamespace(pad_token_id=None, eos_token_id=None, pad_token_type_id=0)
    with pytest.raises(ConfigError, match="neither a padding nor an EOS token"):
        build_text_collator(TaskConfig(), Objective.causal, tokenizer)
    with pytest.raises(ConfigError, match="neither a padding nor an EOS token"):
        build_prompt_collator(Objective.causal, tokenizer)


def test_collators_are_picklable() -> None:
    pair = PairCollator(pad_id=PAD, start_id=7, length=None)
    for collator in (text_collator(length=4), pair, PromptCollator(pad_id=PAD, is_left=True)):
        assert pickle.loads(pickle.dumps(collator)) == collator
