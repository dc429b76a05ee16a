"""Problems, splits and encoded rows of every task."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cola.config.choices import Family, Objective
from cola.config.schema import TaskConfig
from cola.errors import ConfigError, DataError
from cola.synthetic_language import CATEGORY_OPENINGS, synthetic_words
from cola.task_data import Split, TaskData
from cola.tasks import load_task, metric_name, resolve_problem
from cola.tasks.fields import Fields
from cola.tasks.glue import SUBSETS, join_columns
from cola.tasks.synthetic import generate_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = TaskConfig(name="digits", num_labels=10, image_shape=[1, 8, 8])
SYNTHETIC = TaskConfig(name="synthetic", num_labels=2, max_length=32)


def glue(subset: str | None, **settings: Any) -> TaskConfig:
    return TaskConfig(
        **{"name": "glue", "folder": f"glue/{subset}", "subset": subset, "num_labels": 2} | settings
    )


def no_score(**_: Any) -> dict[str, float]:
    return {}


@pytest.fixture(scope="module")
def tokenizer() -> "PreTrainedTokenizerBase":
    """Word level, BERT-like: `<s> ... </s>` and token types."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<s>", "</s>", *synthetic_words()]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def load(
    task: TaskConfig,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    family: Family | None = None,
    data_dir: Path | str | None = None,
    split_seed: int = 0,
) -> TaskData:
    return load_task(
        task,
        resolve_problem(task, family),
        tokenizer=tokenizer,
        score=no_score,
        data_dir=None if data_dir is None else str(data_dir),
        split_seed=split_seed,
        decoder_start_id=2,
    )


def write_split(folder: Path, subset: str, split: str, rows: list[dict[str, Any]]) -> None:
    path = folder / "glue" / subset / f"{split}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


def write_subset(folder: Path, name: str, *, count: int = 40) -> None:
    """Distinct rows: row i repeats the word "fox" i + 1 times."""
    subset = SUBSETS[name]
    rows = [
        {column: " ".join(["fox"] * (i + 1)) for column in subset.columns}
        | {"label": i / 10 if subset.num_labels == 1 else i % subset.num_labels, "idx": i}
        for i in range(count)
    ]
    for split in ("train", *subset.report):
        write_split(folder, name, split, rows)


def row_lengths(split: Split) -> list[int]:
    return [len(row["input_ids"]) for row in split.rows]


# --- problems


@pytest.mark.parametrize("family", [None, Family.encoder])
@pytest.mark.parametrize(
    ("subset", "objective", "num_labels", "metric"),
    [
        ("cola", Objective.classification, 2, "matthews_correlation"),
        ("mnli", Objective.classification, 3, "accuracy"),
        ("qqp", Objective.classification, 2, "accuracy"),
        ("stsb", Objective.regression, 1, "pearson"),
    ],
)
def test_glue_problem_follows_the_subset(
    family: Family | None, subset: str, objective: Objective, num_labels: int, metric: str
) -> None:
    problem = resolve_problem(glue(subset, max_length=64), family)
    assert (problem.objective, problem.num_labels) == (objective, num_labels)
    assert (problem.image_shape, problem.max_length) == (None, 64)
    assert metric_name(glue(subset), objective) == metric


def test_glue_has_the_papers_eight_subsets() -> None:
    assert set(SUBSETS) == {"cola", "mnli", "sst2", "mrpc", "qnli", "qqp", "rte", "stsb"}


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        (None, Objective.classification),
        (Family.encoder, Objective.classification),
        (Family.decoder, Objective.causal),
        (Family.seq2seq, Objective.seq2seq),
    ],
)
def test_synthetic_is_posed_by_the_family(family: Family | None, objective: Objective) -> None:
    problem = resolve_problem(SYNTHETIC, family)
    assert problem.objective is objective
    writes = objective is not Objective.classification
    assert problem.num_labels == (0 if writes else 2)
    assert metric_name(SYNTHETIC, objective) == ("rouge_l" if writes else "accuracy")


def test_stated_objective_wins_over_the_family() -> None:
    task = glue("mrpc", objective=Objective.classification)
    assert resolve_problem(task, Family.decoder).objective is Objective.classification


def test_image_problem_has_a_shape() -> None:
    problem = resolve_problem(DIGITS, None)
    assert (problem.objective, problem.image_shape) == (Objective.image, (1, 8, 8))
    assert metric_name(DIGITS, Objective.image) == "accuracy"


@pytest.mark.parametrize(
    ("task", "family", "message"),
    [
        (glue("mprc"), None, "task.subset=mprc is no GLUE subset; nearest: mrpc"),
        (glue(None), None, "task.subset=None is no GLUE subset; choose one of cola"),
        (glue("mnli", num_labels=5), None, "task.num_labels=5, but glue/mnli has 3"),
        (TaskConfig(name="digts"), None, "no task=digts; nearest: digits"),
        (
            glue("mrpc"),
            Family.decoder,
            r"causal \(posed by the model.s family\) does not fit task=glue; allowed: class",
        ),
        (
            glue("stsb", objective=Objective.classification),
            None,
            r"classification \(task.objective\) does not fit task=glue; allowed: regression",
        ),
        (DIGITS, Family.encoder, "images, but the model is a text encoder"),
        (TaskConfig(name="digits", num_labels=10), None, "task.image_shape=None; give"),
    ],
)
def test_impossible_problem_is_refused(
    task: TaskConfig, family: Family | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_problem(task, family)


# --- GLUE


def test_columns_are_joined_with_their_names() -> None:
    row = {"sentence1": "A b.", "sentence2": "C?", "label": 1, "idx": 0}
    joined = join_columns(Fields(row, "row 1"), ("sentence1", "sentence2"))
    assert joined == "sentence1: A b. sentence2: C?"


@pytest.mark.parametrize("name", sorted(SUBSETS))
def test_glue_subset_loads(name: str, tokenizer: "PreTrainedTokenizerBase", tmp_path: Path) -> None:
    write_subset(tmp_path, name)
    data = load(glue(name), tokenizer, data_dir=tmp_path)
    assert data.name == f"glue/{name}"
    assert (data.selection.name, data.report.name) == ("5 % of train", SUBSETS[name].report[0])
    assert (len(data.train.rows), len(data.selection.rows)) == (38, 2)
    assert [split.name for split in data.extra_report] == list(SUBSETS[name].report[1:])
    batch = data.collate(data.train.rows[:4])
    assert set(batch.inputs) == {"input_ids", "token_type_ids", "attention_mask"}
    assert batch.labels.dtype == (torch.float32 if name == "stsb" else torch.long)


def test_glue_splits_share_no_row_and_keep_all(
    tokenizer: "PreTrainedTokenizerBase", tmp_path: Path
) -> None:
    write_subset(tmp_path, "cola")
    data = load(glue("cola"), tokenizer, data_dir=tmp_path)
    lengths = row_lengths(data.train) + row_lengths(data.selection)
    assert sorted(lengths) == sorted(row_lengths(data.report))
    assert len(set(lengths)) == 40


def test_glue_selection_follows_the_split_seed_not_the_global_one(
    tokenizer: "PreTrainedTokenizerBase", tmp_path: Path
) -> None:
    write_subset(tmp_path, "cola")
    chosen = []
    for global_seed, split_seed in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(global_seed)
        data = load(glue("cola"), tokenizer, data_dir=tmp_path, split_seed=split_seed)
        chosen.append(row_lengths(data.selection))
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_glue_rows_are_cut_to_max_length_and_max_train_rows(
    tokenizer: "PreTrainedTokenizerBase", tmp_path: Path
) -> None:
    write_subset(tmp_path, "cola")
    data = load(glue("cola", max_length=10, max_train_rows=20), tokenizer, data_dir=tmp_path)
    assert max(row_lengths(data.train)) == 10
    assert len(data.train.rows) + len(data.selection.rows) == 20
    assert data.selection.name == "5 % of the first 20 rows of train"


@pytest.mark.parametrize(
    ("subset", "label", "message"),
    [
        ("cola", -1, r"glue/cola \(validation\), row 1: label -1 is not a class from 0 to 1"),
        ("cola", "yes", "label 'yes' is not a class"),
        ("stsb", float("nan"), "label nan is not a finite number"),
    ],
)
def test_glue_label_that_no_loss_takes_is_refused(
    subset: str, label: Any, message: str, tokenizer: "PreTrainedTokenizerBase", tmp_path: Path
) -> None:
    write_subset(tmp_path, subset)
    row = dict.fromkeys(SUBSETS[subset].columns, "fox") | {"label": label}
    write_split(tmp_path, subset, "validation", [row])
    with pytest.raises(DataError, match=message):
        load(glue(subset), tokenizer, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        (7, r"glue/cola \(validation\), row 1: sentence is 7, but has to be a text"),
        ("  ", "sentence is '  ', but has to be a text that is not empty"),
    ],
)
def test_glue_sentence_that_is_no_text_is_refused(
    sentence: Any, message: str, tokenizer: "PreTrainedTokenizerBase", tmp_path: Path
) -> None:
    write_subset(tmp_path, "cola")
    write_split(tmp_path, "cola", "validation", [{"sentence": sentence, "label": 0}])
    with pytest.raises(DataError, match=message):
        load(glue("cola"), tokenizer, data_dir=tmp_path)


def test_glue_evaluation_can_be_cut_short(
    tokenizer: "PreTrainedTokenizerBase", tmp_path: Path
) -> None:
    write_subset(tmp_path, "mnli")
    data = load(glue("mnli", max_eval_rows=7), tokenizer, data_dir=tmp_path)
    parts = [data.selection, data.report, *data.extra_report]
    assert [(part.name, len(part.rows)) for part in parts] == [
        ("5 % of train", 2),
        ("first 7 of validation_matched", 7),
        ("first 7 of validation_mismatched", 7),
    ]


@pytest.mark.parametrize("name", sorted(SUBSETS))
def test_glue_has_builtin_rows(name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    data = load(glue(name), tokenizer, data_dir="builtin")
    assert len(data.train.rows) + len(data.selection.rows) == 24
    assert {len(split.rows) for split in (data.report, *data.extra_report)} == {8}
    if name != "stsb":
        labels = {row["label"] for row in data.report.rows}
        assert labels == set(range(SUBSETS[name].num_labels))


def test_text_task_without_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="task=synthetic holds text, but the model has no token"):
        load(SYNTHETIC)


# --- synthetic


def test_synthetic_rows_are_distinct_balanced_and_within_the_vocabulary() -> None:
    stream = generate_rows()
    rows = [next(stream) for _ in range(2400)]
    assert len(set(rows)) == 2400
    assert 0.45 < sum(row.label for row in rows) / 2400 < 0.55
    assert {row.category for row in rows} == set(CATEGORY_OPENINGS)
    written = [row.written(is_causal=True) for row in rows]
    used = {word for row in written for word in f"{row.source} {row.target}".split()}
    assert used == set(synthetic_words())
    assert len(synthetic_words()) == len(used)


def test_synthetic_response_is_a_function_of_the_prompt() -> None:
    stream = generate_rows()
    row = next(stream)
    opening, majority = row.written(is_causal=True).target.split()
    assert opening == CATEGORY_OPENINGS[row.category]
    assert majority == ("animals", "tools")[row.label]


def test_synthetic_classification_rows(tokenizer: "PreTrainedTokenizerBase") -> None:
    data = load(SYNTHETIC, tokenizer, family=Family.encoder)
    assert [len(split.rows) for split in (data.train, data.selection, data.report)] == [
        2000,
        200,
        200,
    ]
    assert (data.selection.name, data.report.name) == ("validation", "test")
    assert max(row_lengths(data.train)) <= 32
    row = data.train.rows[0]
    assert row["user"] in CATEGORY_OPENINGS
    assert 1 not in row["input_ids"]  # <unk>


def test_synthetic_causal_rows_score_the_response_and_eos(
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    data = load(SYNTHETIC, tokenizer, family=Family.decoder)
    batch = data.collate(data.train.rows[:16])
    assert batch.num_terms == 16 * 3
    assert (batch.labels[:, -1] == tokenizer.eos_token_id).all()
    row = data.train.rows[0]
    assert row["user"] in CATEGORY_OPENINGS
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert int((row["input_ids"] == tokenizer.eos_token_id).sum()) == 1


def test_synthetic_rows_ignore_every_seed(tokenizer: "PreTrainedTokenizerBase") -> None:
    first, second = (
        load(SYNTHETIC, tokenizer, family=Family.encoder, split_seed=seed) for seed in (0, 1)
    )
    for one, other in zip(first.report.rows, second.report.rows, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_synthetic_pairs_score_the_answer_alone(tokenizer: "PreTrainedTokenizerBase") -> None:
    data = load(SYNTHETIC, tokenizer, family=Family.seq2seq)
    batch = data.collate(data.train.rows[:16])
    assert batch.num_terms == 16 * 4  # <s>, two words, </s>
    assert (batch.labels == batch.labels.clamp(min=0)).all()
    row = data.report.rows[0]
    assert row["user"] in CATEGORY_OPENINGS
    assert tokenizer.decode(row["labels"], skip_special_tokens=True) == row["reference"]
    source = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
    assert source.startswith(f"category {row['user']} text")
    assert "response" not in source


def test_synthetic_evaluation_can_be_cut_short(tokenizer: "PreTrainedTokenizerBase") -> None:
    task = dataclasses.replace(SYNTHETIC, max_eval_rows=9)
    for family in (Family.encoder, Family.decoder):
        data = load(task, tokenizer, family=family)
        names = [(split.name, len(split.rows)) for split in (data.selection, data.report)]
        assert names == [("first 9 of validation", 9), ("first 9 of test", 9)]
