"""Evaluation: scores, users, rates and samples of models that classify and of models that write."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola import evaluation
from cola.config.schema import EvaluationConfig, GenerationConfig
from cola.evaluation import Evaluation, evaluate
from cola.generation import Generated
from cola.interfaces import Batch, Problem, Split, TaskData
from cola.models.tokenizer import build_word_tokenizer, word_vocabulary
from cola.objectives import task_loss
from cola.tasks.collate import CausalCollator, TextCollator
from tests.models import image_problem, text_problem
from tests.tiny import Output

CPU = torch.device("cpu")
WORDS = word_vocabulary()


class Looking(nn.Module):
    """Logits by the id of each row's first token, so that every answer is known."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Output:
        return Output(self.table[input_ids[:, 0]])


class Word(nn.Module):
    """Next-token logits by the token itself."""

    def __init__(self, num: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(num, num, generator=generator))

    def forward(self, input_ids: Tensor, **_: Tensor) -> Output:
        return Output(self.table[input_ids])


def share_equal(*, predictions: Any, references: Any) -> dict[str, float]:
    pairs = [a == b for a, b in zip(predictions, references, strict=True)]
    return {"share": sum(map(float, pairs)) / len(pairs)}


def task_of(problem: Problem, collate: Any, rows: list[dict[str, Any]], tokenizer: Any) -> TaskData:
    split = Split(name="test", rows=rows)
    return TaskData(
        name="known", problem=problem, train=split, selection=split, report=split,
        collate=collate, score=share_equal, tokenizer=tokenizer,
    )  # fmt: skip


def evaluated(
    model: nn.Module, task: TaskData, *, batch_size: int = 2, num_samples: int = 2
) -> Evaluation:
    config = EvaluationConfig(batch_size=batch_size, num_samples=num_samples)
    return evaluate(
        model, task.report, task, config=config, generation=GenerationConfig(), device=CPU
    )


def tokenizer() -> Any:
    return build_word_tokenizer(marks_ends=False, padding_side="right")


def ids(*words: str) -> Tensor:
    return torch.tensor([WORDS[word] for word in words])


CLASSES = [
    {"input_ids": ids("ant", "bear"), "label": 0, "user": "u"},
    {"input_ids": ids("anvil"), "label": 1, "user": "v"},
    {"input_ids": ids("ant", "the", "fox"), "label": 1, "user": "u"},
]


def classifier(dtype: torch.dtype = torch.long, num: int = 2) -> tuple[nn.Module, Any]:
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(len(WORDS), num, generator=generator)
    table[WORDS["ant"], 0], table[WORDS["anvil"], -1] = 9.0, 9.5
    collate = TextCollator(pad_id=0, pad_type_id=0, length=None, label_dtype=dtype)
    return Looking(table), collate


def test_classifier_is_scored_by_its_logits():
    model, collate = classifier()
    task = task_of(text_problem(), collate, CLASSES, tokenizer())
    found = evaluated(model, task)
    assert list(found.scores) == ["share", "loss"]
    assert found.scores["share"] == pytest.approx(2 / 3)
    whole = collate(CLASSES)
    loss = task_loss(task.problem.objective, model(**whole.inputs).logits, whole)
    assert found.scores["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_users_are_scored_on_their_own_rows():
    model, collate = classifier()
    found = evaluated(model, task_of(text_problem(), collate, CLASSES, tokenizer()))
    assert found.by_user == {"u": {"share": 0.5}, "v": {"share": 1.0}}
    assert list(found.by_user) == ["u", "v"]


def test_rows_without_a_user_are_nobodys():
    model, collate = classifier()
    rows = [{k: v for k, v in row.items() if k != "user"} for row in CLASSES]
    found = evaluated(model, task_of(text_problem(), collate, rows, tokenizer()))
    assert found.by_user == {}
    assert "user" not in found.samples[0]


def test_samples_of_a_classifier_name_input_and_classes():
    model, collate = classifier()
    task = task_of(text_problem(), collate, CLASSES, tokenizer())
    assert evaluated(model, task, num_samples=2).samples == [
        {"input": "ant bear", "prediction": "0", "reference": "0", "user": "u"},
        {"input": "anvil", "prediction": "1", "reference": "1", "user": "v"},
    ]
    assert len(evaluated(model, task, num_samples=9).samples) == 3
    assert evaluated(model, task, num_samples=0).samples == []


def test_samples_of_a_regression_are_values():
    model, collate = classifier(torch.float32, num=1)
    rows = [{"input_ids": ids("anvil"), "label": 2.25}]
    found = evaluated(model, task_of(text_problem("regression"), collate, rows, tokenizer()))
    assert found.samples == [{"input": "anvil", "prediction": "9.5", "reference": "2.25"}]


def test_rate_of_a_classifier_counts_tokens_read(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model, collate = classifier()
    found = evaluated(model, task_of(text_problem(), collate, CLASSES, tokenizer()))
    assert found.tokens_per_second == 6 / 2  # padding is not counted


def test_images_have_neither_input_nor_rate():
    class Bright(nn.Module):
        def forward(self, pixels: Tensor) -> Output:
            mean = pixels.flatten(1).mean(dim=1)
            return Output(torch.stack([-mean, mean], dim=1))

    def collate(rows: Any) -> Batch:
        pixels = torch.stack([row["pixels"] for row in rows])
        labels = torch.tensor([row["label"] for row in rows])
        return Batch(inputs={"pixels": pixels}, labels=labels, num_terms=len(rows))

    rows = [{"pixels": torch.full((1, 2, 2), value), "label": 1} for value in (0.5, -0.5)]
    found = evaluated(Bright(), task_of(image_problem(1, 2, 2), collate, rows, None))
    assert found.scores["share"] == 0.5
    assert (found.tokens_per_second, found.by_user) == (None, {})
    assert found.samples == [
        {"prediction": "1", "reference": "1"}, {"prediction": "0", "reference": "1"},
    ]  # fmt: skip


WRITTEN = [
    {
        "input_ids": ids("text", "fox", "response", "story"),
        "labels": torch.tensor([-100, -100, -100, WORDS["story"]]),
        "prompt_ids": ids("text", "fox", "response"),
        "reference": "story",
        "user": "u",
    },
    {
        "input_ids": ids("text", "jig", "fact"),
        "labels": torch.tensor([-100, -100, WORDS["fact"]]),
        "prompt_ids": ids("text", "jig"),
        "reference": "fact",
        "user": "v",
    },
]


def test_writing_model_is_scored_by_its_text_and_its_loss_by_the_reference(monkeypatch):
    def write(model: Any, rows: Any, task: Any, config: Any, device: Any) -> Generated:
        assert config == GenerationConfig()
        return Generated(texts=["story", "tools"], num_tokens=30, seconds=2.0)

    monkeypatch.setattr(evaluation, "generate_texts", write)
    model = Word(len(WORDS))
    collate = CausalCollator(pad_id=0, length=None)
    task = task_of(text_problem("causal"), collate, WRITTEN, tokenizer())
    found = evaluated(model, task, batch_size=1)
    assert found.scores["share"] == 0.5
    assert found.by_user == {"u": {"share": 1.0}, "v": {"share": 0.0}}
    assert found.tokens_per_second == 15.0
    assert found.samples[1] == {
        "input": "text jig", "prediction": "tools", "reference": "fact", "user": "v",
    }  # fmt: skip
    whole = collate(WRITTEN)
    loss = task_loss(task.problem.objective, model(**whole.inputs).logits, whole)
    assert found.scores["loss"] == pytest.approx(loss.item(), rel=1e-6)
