"""One's own data: templates, labels, splits, users, and every line that cannot be used."""

import dataclasses
import gzip
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cola.config.choices import Family, Objective
from cola.config.own_data import check_own_data
from cola.config.schema import ExperimentConfig, TaskConfig
from cola.config.store import compose_config
from cola.config.template import parse_template
from cola.errors import ConfigError, DataError
from cola.models.tokenizer import build_word_tokenizer
from cola.task_data import Split, TaskData
from cola.tasks import load_task, metric_name, resolve_problem
from cola.tracking import read_samples
from tests.runs import Run, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]

ANIMALS: Rows = [{"text": f"fox {'goat ' * i}jay", "label": "animal"} for i in range(20)]
TOOLS: Rows = [{"text": f"hammer {'saw ' * i}drill", "label": "tool"} for i in range(20)]
REVIEWS = ANIMALS + TOOLS


@pytest.fixture(scope="module")
def tokenizer() -> "PreTrainedTokenizerBase":
    return build_word_tokenizer(marks_ends=True, padding_side="right")


def write(path: Path, rows: Rows) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


class Folder:
    """Writes files and loads the task that they make."""

    def __init__(self, path: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.path = path
        self.tokenizer = tokenizer

    def task(self, rows: Rows, **settings: Any) -> TaskConfig:
        file = write(self.path / "train.jsonl", rows)
        defaults = {"name": "jsonl", "num_labels": 0, "target": "label", "train_file": file}
        return TaskConfig(**defaults | settings)

    def load(
        self, rows: Rows, *, family: Family = Family.encoder, split_seed: int = 0, **settings: Any
    ) -> TaskData:
        task = self.task(rows, **settings)
        return load_task(
            task,
            resolve_problem(task, family),
            tokenizer=self.tokenizer,
            score=lambda **_: {},
            data_dir=None,
            split_seed=split_seed,
            decoder_start_id=2,
        )

    def text(self, row: Any, column: str = "input_ids") -> str:
        """What a row says, without special tokens."""
        ids = row[column]
        decoded: str = self.tokenizer.decode(ids[ids >= 0], skip_special_tokens=True)
        return decoded


@pytest.fixture
def folder(tmp_path: Path, tokenizer: "PreTrainedTokenizerBase") -> Folder:
    return Folder(tmp_path, tokenizer)


def labels_of(split: Split) -> list[float]:
    return [row["label"] for row in split.rows]


# --- how a file is posed


@pytest.mark.parametrize(
    ("family", "objective", "num_labels", "metric"),
    [
        (Family.encoder, Objective.classification, 2, "accuracy"),
        (Family.decoder, Objective.causal, 0, "rouge_l"),
        (Family.seq2seq, Objective.seq2seq, 0, "rouge_l"),
    ],
)
def test_model_family_poses_the_task(
    family: Family, objective: Objective, num_labels: int, metric: str, folder: Folder
) -> None:
    task = folder.task(REVIEWS)
    problem = resolve_problem(task, family)
    assert (problem.objective, problem.num_labels) == (objective, num_labels)
    assert metric_name(task, objective) == metric


def test_stated_objective_wins_over_the_family(folder: Folder) -> None:
    task = folder.task(REVIEWS, objective=Objective.classification)
    assert resolve_problem(task, Family.decoder).num_labels == 2
    task = folder.task([{"text": "fox", "label": 1.5}], objective=Objective.regression)
    assert resolve_problem(task, Family.encoder).num_labels == 1
    assert metric_name(task, Objective.regression) == "pearson"


# --- classification and regression


def test_classes_are_the_train_files_values_sorted(folder: Folder) -> None:
    data = folder.load(REVIEWS)
    parts = [data.train, data.selection, data.report]
    assert [len(part.rows) for part in parts] == [34, 2, 4]
    assert [part.name for part in parts[1:]] == ["5 % of the other 90 % of train", "10 % of train"]
    for part in parts:
        for row in part.rows:
            assert row["label"] == ("drill" in folder.text(row))
    assert data.collate([data.train.rows[0]]).labels.dtype == torch.long
    assert data.tokenizer is folder.tokenizer
    assert "user" not in data.train.rows[0]


def test_integer_classes_sort_as_numbers(folder: Folder) -> None:
    rows = [{"text": "fox", "label": label} for label in (10, 9, 100, 9)]
    data = folder.load(rows, validation_file=write(folder.path / "v.jsonl", rows))
    assert labels_of(data.report) == [1, 0, 2, 0]


def test_stated_labels_fix_the_order(folder: Folder) -> None:
    data = folder.load(REVIEWS, labels=["tool", "animal", "plant"])
    assert data.problem.num_labels == 3
    assert all(row["label"] == ("fox" in folder.text(row)) for row in data.train.rows)


def test_gzipped_files_and_byte_order_marks_are_read(folder: Folder) -> None:
    file = write(folder.path / "v.jsonl.gz", REVIEWS[:3])
    (folder.path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(REVIEWS[0]).encode())
    data = folder.load(REVIEWS, validation_file=file, test_file=str(folder.path / "t.jsonl"))
    assert (len(data.selection.rows), len(data.report.rows)) == (3, 1)
    assert (data.selection.name, data.report.name) == ("validation", "test")


def test_regression_takes_numbers(folder: Folder) -> None:
    rows = [{"text": "fox", "label": value} for value in (0.5, 2, -1.25)]
    data = folder.load(
        rows,
        objective=Objective.regression,
        validation_file=write(folder.path / "v.jsonl", rows),
    )
    batch = data.collate(data.report.rows)
    assert batch.labels.tolist() == [0.5, 2.0, -1.25]
    assert batch.labels.dtype == torch.float32


def test_users_are_kept_as_text(folder: Folder) -> None:
    rows = [row | {"owner": number} for number, row in enumerate(REVIEWS)]
    for family in (Family.encoder, Family.decoder):
        data = folder.load(rows, user="owner", family=family, template="{text}")
        users = {row["user"] for part in (data.train, data.report) for row in part.rows}
        assert users < {str(number) for number in range(40)}
        assert len(users) == 38


def test_rows_are_limited_and_splits_follow_the_split_seed(folder: Folder) -> None:
    data = folder.load(REVIEWS, max_train_rows=20, max_eval_rows=1)
    assert len(data.train.rows) + round(0.05 * 20) == 20
    assert (len(data.selection.rows), len(data.report.rows)) == (1, 1)
    reports = [
        [folder.text(row) for row in folder.load(REVIEWS, split_seed=seed).report.rows]
        for seed in (0, 0, 1)
    ]
    assert reports[0] == reports[1] != reports[2]


# --- writing


def test_causal_rows_answer_the_filled_template(folder: Folder) -> None:
    rows = [{"animal": "fox", "count": 3, "is_wild": True, "answer": "goat jay"}] * 4
    template = "{{text}} {animal} {count} {is_wild} response: "
    data = folder.load(rows, family=Family.decoder, template=template, target="answer")
    row = data.report.rows[0]
    assert row["reference"] == "goat jay"
    words = folder.tokenizer("{text} fox 3 true response: ", add_special_tokens=False)["input_ids"]
    assert row["prompt_ids"].tolist()[-len(words) :] == words
    assert folder.text(row, "labels") == "goat jay"
    assert data.collate_prompts is not None


def test_seq2seq_rows_hold_source_and_target(folder: Folder) -> None:
    rows = [{"text": "fox goat", "label": 7}] * 4  # a number is written as it is
    data = folder.load(rows, family=Family.seq2seq)
    row = data.report.rows[0]
    assert (folder.text(row), row["reference"]) == ("fox goat", "7")
    assert set(data.collate(data.train.rows).inputs) >= {"input_ids", "decoder_input_ids"}


def test_only_text_column_needs_no_template(folder: Folder) -> None:
    rows = [row | {"id": 5, "tags": [], "owner": "a"} for row in REVIEWS]
    assert "fox" in folder.text(folder.load(rows, user="owner").train.rows[0])
    message = (
        r"train.jsonl has 2 text columns beside the target, so task.template has to say what the "
        r"model reads; it may name text, id, tags, owner, for example 'task.template="
    )
    with pytest.raises(ConfigError, match=message):
        folder.load(rows)
    with pytest.raises(DataError, match=r"line 1: no column 'labl'.*nearest: label"):
        folder.load(rows, target="labl", family=Family.decoder)
    with pytest.raises(DataError, match=r"train.jsonl holds no rows"):
        folder.load([], family=Family.decoder)


def test_rows_that_are_trained_on_and_scored_are_counted(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        folder.load(REVIEWS, test_file=write(folder.path / "t.jsonl", REVIEWS[:2]))
    assert "2 of 2 rows of test are in train, too" in caplog.text


# --- lines that cannot be used

FOX = {"text": "fox", "label": "animal"}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"txt": "fox", "label": "tool"}, {}, r"no column 'text' \(task.template\); nearest: txt"),
        ({"text": "a"}, {}, r"no column 'label' \(task.target\); choose one of text"),
        (FOX, {"user": "usr"}, r"no column 'usr' \(task.user\); choose one of text, label"),
        (FOX | {"user": True}, {"user": "user"}, "column 'user': True is no user"),
        (FOX | {"user": " "}, {"user": "user"}, "column 'user': ' ' is no user"),
        ({"text": None, "label": "tool"}, {}, "column 'text': null, but it has to be text"),
        ({"text": ["a"], "label": "tool"}, {}, "column 'text': a list, but it has to be text"),
        ({"text": {}, "label": "tool"}, {}, "column 'text': a dict, but it has to be text"),
        ({"text": " ", "label": "tool"}, {}, "the filled template is empty"),
        ({"text": "fox", "label": 1.5}, {}, "column 'label': 1.5 is no class.*regression"),
        ({"text": "fox", "label": True}, {}, "column 'label': True is no class"),
        ({"text": "fox", "label": " "}, {}, "column 'label': ' ' is no class"),
        ({"text": "fox", "label": 3}, {}, "class 3 beside 'animal'; write the classes as text or"),
        (FOX, {"labels": ["animals", "tool"]}, "class 'animal' is not among.*nearest: animals"),
    ],
)
def test_train_line_that_cannot_be_used_is_named(
    row: dict[str, Any], settings: dict[str, Any], message: str, folder: Folder
) -> None:
    rows = [FOX, {"text": "saw", "label": "tool"}]
    rows = [one | {"user": 1, "usr": 2} for one in rows] if "user" in settings else rows
    rows = [one | {"label": "tool"} for one in rows] if "labels" in settings else rows
    with pytest.raises(DataError, match=f"train.jsonl, line 3.*{message}"):
        folder.load([*rows, row], template="{text}", **settings)


def test_target_that_holds_no_classes_at_all_names_its_first_line(folder: Folder) -> None:
    rows = [{"text": "fox", "label": value} for value in (1.5, 2.5, 3.5)]
    with pytest.raises(DataError, match=r"line 1, column 'label': 1.5 is no class; .*=regression"):
        folder.load(rows)


@pytest.mark.parametrize(
    ("family", "objective", "target", "message"),
    [
        (Family.encoder, None, "tols", "class 'tols' is not among those of.*nearest: tool"),
        (Family.encoder, Objective.regression, "2", "'2' is not a finite number"),
        (Family.encoder, Objective.regression, True, "True is not a finite number"),
        (Family.encoder, Objective.regression, float("nan"), "nan is not a finite number"),
        (Family.decoder, None, " ", "nothing for the model to write"),
        (Family.seq2seq, None, None, "null, but it has to be text"),
    ],
)
def test_target_of_a_scored_file_that_does_not_fit_is_named(
    family: Family, objective: Objective | None, target: Any, message: str, folder: Folder
) -> None:
    is_value = objective is Objective.regression
    rows = [{"text": "fox", "label": 1} for _ in range(4)] if is_value else REVIEWS
    test_file = write(folder.path / "test.jsonl", [rows[0], {"text": "fox", "label": target}])
    with pytest.raises(DataError, match=f"test.jsonl, line 2, column 'label': .*{message}"):
        folder.load(rows, family=family, objective=objective, test_file=test_file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.jsonl holds no rows; give one JSON object per line"),
        ('{"text": "fox", "label": "a"}\n{"text"', "train.jsonl, line 2: not valid JSON"),
        ('[{"text": "fox", "label": "a"}]', "line 1: holds a list; every line has to be an object"),
    ],
)
def test_file_that_is_no_json_lines_is_refused(text: str, message: str, folder: Folder) -> None:
    task = folder.task([], template="{text}", labels=["a", "b"])
    (folder.path / "train.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        load_task(
            task,
            resolve_problem(task, Family.encoder),
            tokenizer=folder.tokenizer,
            score=lambda **_: {},
            data_dir=None,
            split_seed=0,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 5}, r"task.num_labels=5, but there are 2 classes \(animal, tool\)"),
        (
            {"family": Family.decoder, "labels": ["a", "b"]},
            "task.labels would have no effect with objective causal",
        ),
        (
            {"family": Family.seq2seq, "num_labels": 2},
            "task.num_labels would have no effect with objective seq2seq",
        ),
    ],
)
def test_classes_have_to_fit_data_and_model(
    settings: dict[str, Any], message: str, folder: Folder
) -> None:
    with pytest.raises(ConfigError, match=message):
        folder.load(REVIEWS, **settings)


def test_one_class_is_none(folder: Folder) -> None:
    with pytest.raises(DataError, match=r"column 'label' holds 1 classes; classification needs"):
        folder.load(ANIMALS)


# --- templates


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a.b}", r"\{a.b\} is not the plain name of a column; attributes"),
        ("{a[0]}", r"\{a\[0\]\} is not the plain name"),
        ("{a!r}", r"\{a!r\} is not the plain name"),
        ("{a:>10}", r"\{a:>10\} is not the plain name"),
        ("{}", r"\{\} is not the plain name"),
        ("{a", r"write a column as \{name\}, and a literal brace as \{\{ or \}\}"),
        ("a} {b}", r"write a column as \{name\}, and a literal"),
        ("{{text}}", r"names no column; write it as in"),
        ("", r"names no column"),
    ],
)
def test_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_template(template)


def test_template_is_filled() -> None:
    template = parse_template("{{x}}: {two words}, {n}; {two words}")
    assert template.columns == ("two words", "n")
    assert template.fill({"two words": "{n}", "n": 1.0}, "") == "{x}: {n}, 1.0; {n}"


# --- the configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_file": None}, "task.train_file is not set; for example: cola-train task=jsonl"),
        ({"target": None}, "task.target is not set; for example: cola-train task=jsonl task.tr"),
        (
            {"test_file": "nowhere.jsonl"},
            r"task.test_file=nowhere.jsonl: .* \(looked for /.*nowhere",
        ),
        ({"train_file": "a.csv"}, r"task.train_file=a.csv: .* ends in .jsonl or .jsonl.gz"),
        ({"test_file": "FILE"}, "task.test_file=.* is task.train_file as well"),
        ({"template": "{label}"}, "task.template names the target column 'label'"),
        ({"template": "{x.y}"}, "not the plain name of a column"),
        ({"labels": ["a", "a"]}, r"task.labels=\[a,a\]: name at least two classes, each once"),
        ({"labels": ["a"]}, "name at least two classes"),
        ({"labels": ["a", "b"], "num_labels": 3}, "task.num_labels=3, but task.labels names 2"),
        ({"name": "glue"}, "task.train_file would have no effect with task=glue; use task=jsonl"),
        ({"name": "glue", "train_file": None}, "task.target would have no effect with task=glue"),
    ],
)
def test_configuration_is_refused(settings: dict[str, Any], message: str, folder: Folder) -> None:
    file = str(folder.path / "train.jsonl")
    given = {key: file if value == "FILE" else value for key, value in settings.items()}
    with pytest.raises(ConfigError, match=message):
        check_own_data(ExperimentConfig(task=folder.task([FOX], **given)))


def test_folder_of_data_is_refused(folder: Folder) -> None:
    config = ExperimentConfig(task=folder.task([FOX]), data_dir="data")
    with pytest.raises(ConfigError, match="data_dir=data would have no effect with task=jsonl"):
        check_own_data(config)


def test_command_line_checks_own_data() -> None:
    with pytest.raises(ConfigError, match=r"task.train_file is not set"):
        compose_config(["task=jsonl"])


def test_dry_run_needs_no_file_but_the_classes() -> None:
    task = TaskConfig(name="jsonl", train_file="none.jsonl", target="label", num_labels=0)
    check_own_data(ExperimentConfig(task=task, dry_run=True))
    with pytest.raises(ConfigError, match=r"none.jsonl does not exist.*set task.labels=\[NAME"):
        resolve_problem(task, Family.encoder)
    for known in ({"labels": ["a", "b", "c"]}, {"num_labels": 3}):
        stated = dataclasses.replace(task, **known)
        assert resolve_problem(stated, Family.encoder).num_labels == 3


# --- whole runs


def own_run(folder: Folder, model: str, metric: str) -> Run:
    train = write(folder.path / "train.jsonl", REVIEWS)
    settings = (f"task.train_file={train}", "task.target=label", "trainer.batch_size=8")
    finished = run(
        folder.path / "run", "task=jsonl", f"model={model}", *settings, "trainer.max_steps=2"
    )
    assert finished.summary["task"] == "jsonl"
    assert finished.summary["result"]["metric"] == metric
    assert finished.summary["result"]["split"] == "10 % of train"
    return finished


def test_run_classifies_own_files(folder: Folder) -> None:
    done = own_run(folder, "tiny-roberta", "accuracy")
    samples = read_samples(done.folder)
    assert {row["prediction"] for row in samples} <= {"animal", "tool"}, "classes by their names"


@pytest.mark.slow  # rouge-score takes seconds to import
@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-bart"])
def test_run_writes_answers_of_own_files(model: str, folder: Folder) -> None:
    own_run(folder, model, "rougeL")
