"""Evaluation: scores, users, rates and samples of models that classify and of models that write."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola import evaluation
from cola.config.schema import EvaluationConfig, GenerationConfig
from cola.errors import DataError
from cola.evaluation import Evaluation, evaluate
from cola.generation import Generated
from cola.models.tokenizer import build_word_tokenizer, word_vocabulary
from cola.objectives import task_loss
from cola.task_data import Batch, Problem, Split, TaskData
from cola.tasks.collate import CausalCollator, TextCollator, build_prompt_collator, collate_images
from cola.user_rows import UserRows
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


def task_of(
    problem: Problem, collate: Any, rows: list[dict[str, Any]], tokenizer: Any, **settings: Any
) -> TaskData:
    users = sorted({row["user"] for row in rows if "user" in row})
    owners = torch.tensor([users.index(row["user"]) for row in rows]) if users else None
    split = Split(name="test", rows=rows, owners=owners)
    return TaskData(
        name="known", problem=problem, train=split, selection=split, report=split,
        collate=collate, score=share_equal, tokenizer=tokenizer, users=tuple(users), **settings,
    )  # fmt: skip


def evaluated(
    model: nn.Module,
    task: TaskData,
    *,
    batch_size: int = 2,
    num_samples: int = 2,
    route: Any = lambda rows: None,
    present: frozenset[int] | None = None,
) -> Evaluation:
    config = EvaluationConfig(batch_size=batch_size, num_samples=num_samples)
    return evaluate(
        model, task.report, task, config=config, generation=GenerationConfig(), device=CPU,
        route=route, present=present,
    )  # fmt: skip


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
    def write(
        model: Any, rows: Any, task: Any, config: Any, device: Any, *, owners: Any, route: Any
    ) -> Generated:
        assert config == GenerationConfig()
        assert owners is None  # all users meet the same adapters: equal prompts, equal answers
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


# Users with adapters of their own ----------------------------------------------------------------


class Owned(nn.Module):
    """Logits that each row's user decides: what a learner's taps do with the rows they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: UserRows | None = None
        self.told: list[UserRows | None] = []

    def route(self, rows: UserRows | None) -> None:
        self.rows = rows
        self.told.append(rows)

    def forward(self, input_ids: Tensor, **_: Tensor) -> Output:
        assert self.rows is not None
        assert self.rows.total == len(input_ids)
        owners = [user for user, where in self.rows.slices() for _ in range(len(input_ids))[where]]
        return Output(torch.eye(3)[owners])


def users_task(users: str, **settings: Any) -> TaskData:
    """Rows whose label is their user's position, so that a row of another one counts as wrong."""
    names = sorted(set(users))
    rows = [
        {"input_ids": ids("fox", *["the"] * index), "label": names.index(user), "user": user}
        for index, user in enumerate(users)
    ]
    _, collate = classifier()
    return task_of(text_problem(), collate, rows, tokenizer(), groups_users=True, **settings)


def test_every_forward_pass_is_told_whose_rows_it_has():
    model = Owned()
    found = evaluated(model, users_task("cabca"), batch_size=3, route=model.route)
    assert model.told == [
        UserRows(users=(0, 1, 2), counts=(1, 1, 1)), UserRows(users=(0, 2), counts=(1, 1)), None,
    ]  # fmt: skip
    assert found.scores["share"] == 1.0
    assert found.by_user == {user: {"share": 1.0} for user in "abc"}


def test_predictions_come_back_in_the_order_of_the_split():
    model = Owned()
    found = evaluated(model, users_task("cabca"), batch_size=4, num_samples=5, route=model.route)
    assert [sample["user"] for sample in found.samples] == [*"cabca"]
    assert [sample["prediction"] for sample in found.samples] == [*"20120"]
    assert [len(sample["input"].split()) for sample in found.samples] == [1, 2, 3, 4, 5]


def test_rows_of_users_that_take_no_part_have_no_say():
    model = Owned()
    task = users_task("cabcabb")
    found = evaluated(model, task, num_samples=9, route=model.route, present=frozenset({0, 2}))
    assert list(found.by_user) == ["a", "c"]
    assert [sample["user"] for sample in found.samples] == [*"caca"]
    assert {user for rows in model.told if rows for user in rows.users} == {0, 2}
    whole = torch.eye(3)[[2, 0, 2, 0]]
    labels = torch.tensor([2, 0, 2, 0])
    wanted = torch.nn.functional.cross_entropy(whole, labels)
    assert found.scores["loss"] == pytest.approx(wanted.item(), rel=1e-6)


def test_split_without_a_user_that_takes_part_is_refused():
    model = Owned()
    message = r"known \(test\): no row is of a user that takes part now, .* do not: a, b; change"
    with pytest.raises(DataError, match=message):
        evaluated(model, users_task("abba"), route=model.route, present=frozenset())


def test_nobodys_rows_are_told_after_a_failure():
    model = Owned()
    model.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluated(model, users_task("ab"), route=model.route)
    assert model.told[-1] is None


def test_users_are_scored_in_the_runs_order():
    model, collate = classifier()
    task = task_of(text_problem(), collate, CLASSES, tokenizer())
    task = dataclasses.replace(
        task,
        users=("none", "v", "u"),
        report=dataclasses.replace(task.report, owners=torch.tensor([2, 1, 2])),
    )
    assert list(evaluated(model, task).by_user.items()) == [
        ("v", {"share": 1.0}), ("u", {"share": 0.5}),
    ]  # fmt: skip


def test_images_of_users_are_scored_apart():
    class First(nn.Module):
        def forward(self, pixels: Tensor) -> Output:
            return Output(torch.tensor([[1.0, 0.0]]).expand(len(pixels), 2))

    rows = [{"pixels": torch.zeros(1, 2, 2), "label": label} for label in (0, 1, 0)]
    split = Split(name="test", rows=rows, owners=torch.tensor([1, 0, 1]))
    task = dataclasses.replace(
        task_of(image_problem(1, 2, 2), collate_images, rows, None),
        report=split, users=("a", "b"), groups_users=True,
    )  # fmt: skip
    found = evaluated(First(), task)
    assert found.by_user == {"a": {"share": 0.0}, "b": {"share": 1.0}}
    assert found.samples[0] == {"prediction": "0", "reference": "0", "user": "b"}


class OwnedWriter(Word):
    """Writes its reader's position; told as `Owned` is."""

    def __init__(self) -> None:
        super().__init__(len(WORDS))
        self.rows: UserRows | None = None
        self.generation_config = SimpleNamespace(
            decoder_start_token_id=None, forced_bos_token_id=None, forced_eos_token_id=None
        )

    def route(self, rows: UserRows | None) -> None:
        self.rows = rows

    def generate(self, *, input_ids: Tensor, attention_mask: Tensor, generation_config: Any):
        assert self.rows is not None
        words = torch.tensor([WORDS["ant"], WORDS["bear"]])
        said = torch.cat([words[[user]].expand(count) for user, count in
                          zip(self.rows.users, self.rows.counts, strict=True)])  # fmt: skip
        return torch.cat([input_ids, said[:, None]], dim=1)


def test_text_is_each_users_own():
    model = OwnedWriter()
    rows = [{**WRITTEN[index], "user": user, "reference": word} for index, user, word in
            ((0, "v", "bear"), (0, "u", "ant"), (1, "v", "bear"), (0, "u", "ant"))]  # fmt: skip
    task = task_of(
        text_problem("causal"), CausalCollator(pad_id=0, length=None), rows, tokenizer(),
        groups_users=True,
        collate_prompts=build_prompt_collator(text_problem("causal").objective, tokenizer()),
    )  # fmt: skip
    found = evaluated(model, task, route=model.route)
    assert found.scores["share"] == 1.0
    only = evaluated(model, task, route=model.route, present=frozenset({1}), num_samples=4)
    assert only.by_user == {"v": {"share": 1.0}}
    assert [sample["prediction"] for sample in only.samples] == ["bear", "bear"]
