"""The paper's text sets: from the hub's columns to what a model is given and has to write."""

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cola.config.choices import Family, Objective
from cola.config.schema import TaskConfig
from cola.errors import ConfigError, DataError
from cola.synthetic_language import CATEGORY_OPENINGS
from cola.task_data import TaskData
from cola.tasks import load_task, metric_name, resolve_problem
from cola.tasks.text_sets import TEXT_SETS
from tests.byte_tokenizer import END, byte_tokenizer
from tests.configs import composed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def fpb(word: str) -> Row:
    return {"sentence": f"{word} rose by 3 % .", "label": 2}


def wikisql(word: str) -> Row:
    return {
        "phase": 1,
        "question": f"Who plays {word}?",
        "table": {"id": "1-1", "header": ["Player", "Part"]},
        "sql": {"human_readable": f"SELECT Player FROM table WHERE Part = {word}", "sel": 0},
    }


def samsum(word: str) -> Row:
    return {"id": "1", "dialogue": f"A: {word}?\r\nB: yes", "summary": f"B agrees to {word}."}


def e2e_nlg(word: str) -> Row:
    return {"meaning_representation": f"name[{word}]", "human_reference": f"It is {word}."}


def web_nlg(word: str) -> Row:
    return {
        "category": "Food",
        "size": 2,
        "modified_triple_sets": {
            "mtriple_set": [[f"{word} | is | a", "a | in | b"], ["c | d | e"]]
        },
        "lex": {"comment": ["good", "good"], "text": [f"{word} one.", f"{word} two."]},
    }


def dart(word: str) -> Row:
    return {
        "tripleset": [[word, "IN", "Brae"], ["Brae", "OF", "Norland"]],
        "subtree_was_extended": False,
        "annotations": {"source": ["lily", "mturk"], "text": [f"{word} one.", f"{word} two."]},
    }


def dolly(word: str) -> Row:
    return {
        "instruction": f"Say {word}.",
        "context": "",
        "response": f"{word}!",
        "category": "open_qa",
    }


ROWS: dict[str, Callable[[str], Row]] = {
    function.__name__: function
    for function in (fpb, wikisql, samsum, e2e_nlg, web_nlg, dart, dolly)
}

SOURCES = {
    "fpb": "fox rose by 3 % .",
    "wikisql": "question: Who plays fox? table: Player, Part",
    "samsum": "A: fox?\r\nB: yes",
    "e2e_nlg": "name[fox]",
    "web_nlg": "category: Food, mtriple_set: fox | is | a - a | in | b ; c | d | e",
    "dart": "source: lily, tripleset: fox - IN - Brae ; Brae - OF - Norland",
    "dolly": "instruction: Say fox. context: ",
}

TARGETS = {
    "fpb": ["positive"],
    "wikisql": ["SELECT Player FROM table WHERE Part = fox"],
    "samsum": ["B agrees to fox."],
    "e2e_nlg": ["It is fox."],
    "web_nlg": ["fox one.", "fox two."],
    "dart": ["fox one.", "fox two."],
    "dolly": ["fox!"],
}

FAMILIES = {Objective.seq2seq: Family.seq2seq, Objective.causal: Family.decoder}


@pytest.fixture(scope="module")
def tokenizers() -> dict[Objective, "PreTrainedTokenizerBase"]:
    return {
        Objective.seq2seq: byte_tokenizer(marks_ends=True),
        Objective.causal: byte_tokenizer(marks_ends=False),
    }


def task_of(name: str, **settings: Any) -> TaskConfig:
    return TaskConfig(
        **{"name": name, "folder": name, "num_labels": 0, "max_length": 200} | settings
    )


def write(folder: Path, name: str, **splits: list[Row] | str) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"{split}.jsonl").write_text(text)


def write_all(folder: Path, name: str, *, test: list[Row] | str | None = None) -> None:
    make = ROWS[name]
    write(
        folder,
        name,
        train=[make("deer"), make("hare")],
        validation=[make("jay")],
        test=[make("fox")] if test is None else test,
    )


def load(
    task: TaskConfig,
    folder: Path | str,
    tokenizers: Mapping[Objective, "PreTrainedTokenizerBase"],
    objective: Objective = Objective.seq2seq,
    *,
    split_seed: int = 0,
) -> TaskData:
    return load_task(
        task,
        resolve_problem(task, FAMILIES[objective]),
        tokenizer=tokenizers[objective],
        score=lambda **_: {},
        data_dir=str(folder),
        split_seed=split_seed,
        decoder_start_id=END,
    )


def changed(row: Row, path: str, value: Any) -> Row:
    """A copy of the row with the value at a dotted path replaced, or taken out if it is `...`."""
    row = copy.deepcopy(row)
    *parents, last = path.split(".")
    inner = row
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return row


# --- problems


@pytest.mark.parametrize("name", sorted(TEXT_SETS))
def test_set_is_posed_by_the_models_family(name: str) -> None:
    task = task_of(name)
    natural = Objective.causal if name == "dolly" else Objective.seq2seq
    assert resolve_problem(task, None).objective is natural
    for objective, family in FAMILIES.items():
        problem = resolve_problem(task, family)
        assert (problem.objective, problem.num_labels) == (objective, 0)
        assert metric_name(task, objective) == "rouge_l"


def test_set_cannot_be_classified() -> None:
    expected = r"classification \(posed by the model's family\) does not fit task=fpb; allowed: seq"
    with pytest.raises(ConfigError, match=expected):
        resolve_problem(task_of("fpb"), Family.encoder)


@pytest.mark.parametrize("name", sorted(TEXT_SETS))
def test_configuration_has_the_papers_settings(name: str) -> None:
    config = composed(f"task={name}").config
    assert config.model.name == ("gpt2" if name == "dolly" else "bart-base")
    assert (config.task.objective, config.task.max_length) == (None, 128)
    assert (config.trainer.epochs, config.trainer.batch_size) == (40, 32)
    assert (config.optimizer.weight_decay, config.schedule.warmup_ratio) == (5e-4, 0.05)


# --- rows


@pytest.mark.parametrize("name", sorted(ROWS))
def test_row_of_an_encoder_decoder(
    name: str, tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, name)
    data = load(task_of(name), tmp_path, tokenizers)
    tokenizer = tokenizers[Objective.seq2seq]
    assert (data.name, data.selection.name, data.report.name) == (name, "validation", "test")
    assert data.tokenizer is tokenizer
    assert [row["reference"] for row in data.report.rows] == TARGETS[name]
    row = data.report.rows[0]
    assert tokenizer.decode(row["input_ids"]) == f"<s>{SOURCES[name]}</s>"
    assert tokenizer.decode(row["labels"]) == f"<s>{TARGETS[name][0]}</s>"
    assert row["prompt_ids"].tolist() == row["input_ids"].tolist()


@pytest.mark.parametrize("name", sorted(ROWS))
def test_row_of_a_causal_model(
    name: str, tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, name)
    data = load(task_of(name), tmp_path, tokenizers, Objective.causal)
    tokenizer, row = tokenizers[Objective.causal], data.report.rows[0]
    prompt = f"{SOURCES[name]} response: "
    assert tokenizer.decode(row["prompt_ids"]) == prompt
    assert tokenizer.decode(row["input_ids"]) == f"{prompt}{TARGETS[name][0]}</s>"
    scored = [token for token in row["labels"].tolist() if token != -100]
    assert tokenizer.decode(scored) == f"{TARGETS[name][0]}</s>"
    assert row["reference"] == TARGETS[name][0]


def test_dolly_prompt_holds_its_context(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    row = dolly("fox") | {"context": "A fox is red."}
    write_all(tmp_path, "dolly", test=[row])
    data = load(task_of("dolly"), tmp_path, tokenizers, Objective.causal)
    prompt = tokenizers[Objective.causal].decode(data.report.rows[0]["prompt_ids"])
    assert prompt == "instruction: Say fox. context: A fox is red. response: "


@pytest.mark.parametrize("objective", FAMILIES)
def test_batches_and_prompts_are_padded_for_the_model(
    objective: Objective, tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, "web_nlg", test=[web_nlg("a"), web_nlg("an ibex")])
    data = load(task_of("web_nlg"), tmp_path, tokenizers, objective)
    batch = data.collate(data.train.rows[:2])
    is_pair = objective is Objective.seq2seq
    assert ("decoder_input_ids" in batch.inputs) == is_pair
    assert data.collate_prompts is not None
    prompts = data.collate_prompts([data.report.rows[0], data.report.rows[2]])
    first, second = prompts["attention_mask"].tolist()
    assert set(second) == {1}
    assert first == sorted(first, reverse=is_pair)
    assert 0 in first


@pytest.mark.parametrize("objective", FAMILIES)
def test_max_length_pads_every_batch_alike(
    objective: Objective, tokenizers: dict[Objective, "PreTrainedTokenizerBase"]
) -> None:
    config = composed("task=fpb", "task.padding=max_length").config
    data = load(config.task, "builtin", tokenizers, objective)
    batch = data.collate(data.train.rows[:2])
    assert {tensor.shape for tensor in (*batch.inputs.values(), batch.labels)} == {(2, 128)}


def test_users_are_the_categories(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    for name, user in (("dolly", "open_qa"), ("web_nlg", "Food"), ("dart", None)):
        write_all(tmp_path, name)
        data = load(task_of(name), tmp_path, tokenizers)
        assert data.train.rows[0].get("user") == user


def test_rows_without_a_category_have_no_user(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, "dolly", test=[dolly("fox") | {"category": ""}])
    data = load(task_of("dolly"), tmp_path, tokenizers)
    assert "user" not in data.report.rows[0]


def test_rows_that_are_learned_from_are_not_generated_for(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, "fpb")
    data = load(task_of("fpb"), tmp_path, tokenizers)
    assert set(data.train.rows[0]) == {"input_ids", "labels"}
    assert set(data.selection.rows[0]) == {"input_ids", "labels", "prompt_ids", "reference"}


@pytest.mark.parametrize("dialogue", ["", None])
def test_samsum_has_a_row_without_dialogue(
    dialogue: str | None,
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"],
    tmp_path: Path,
) -> None:
    write_all(tmp_path, "samsum", test=[samsum("fox") | {"dialogue": dialogue}])
    data = load(task_of("samsum"), tmp_path, tokenizers)
    row = data.report.rows[0]
    assert tokenizers[Objective.seq2seq].decode(row["input_ids"]) == "<s></s>"


def test_web_nlg_entry_without_text_gives_no_row(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    empty = changed(web_nlg("a"), "lex.text", [])
    write_all(tmp_path, "web_nlg", test=[empty, web_nlg("fox")])
    data = load(task_of("web_nlg"), tmp_path, tokenizers)
    assert [row["reference"] for row in data.report.rows] == TARGETS["web_nlg"]


def test_every_sentiment_has_its_word(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, "fpb", test=[fpb("x") | {"label": label} for label in range(3)])
    data = load(task_of("fpb"), tmp_path, tokenizers)
    words = [row["reference"] for row in data.report.rows]
    assert words == ["negative", "neutral", "positive"]


# --- rows that cannot be used


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("fpb", "sentence", ..., "line 1: lacks column sentence; it has label"),
        ("fpb", "sentence", 5, "sentence is 5, but has to be a text"),
        ("fpb", "sentence", " ", "sentence is ' ', but has to be a text that is not empty"),
        ("fpb", "label", 3, "label is 3, but has to be a class from 0 to 2"),
        ("fpb", "label", "positive", "label is 'positive', but has to be a class from 0 to 2"),
        ("fpb", "label", True, "label is True, but has to be a class"),
        ("wikisql", "table", ..., "lacks column table"),
        ("wikisql", "table.header", ..., "table is .*, but has to be an object with a field head"),
        ("wikisql", "table", "x", "table is 'x', but has to be an object with a field header"),
        ("wikisql", "table.header", ["a", 1], r"table.header is \['a', 1\], but has to be a list"),
        ("wikisql", "question", None, "question is None, but has to be a text that is not empty"),
        ("wikisql", "sql.human_readable", "", "sql.human_readable is '', but has to be a text"),
        ("samsum", "dialogue", 1, "dialogue is 1, but has to be a text"),
        ("samsum", "summary", "", "summary is '', but has to be a text that is not empty"),
        ("samsum", "summary", ..., "lacks column summary"),
        ("e2e_nlg", "meaning_representation", [], r"meaning_representation is \[\], but has to"),
        ("e2e_nlg", "human_reference", "\n", "human_reference is .*that is not empty"),
        ("web_nlg", "category", None, "category is None, but has to be a text that is not empty"),
        ("web_nlg", "lex.text", ["fox", ""], "lex.text is .*list of texts, none of them empty"),
        ("web_nlg", "lex.text", "fox", "lex.text is 'fox', but has to be a list of texts"),
        ("web_nlg", "lex", ..., "lacks column lex"),
        (
            "web_nlg",
            "modified_triple_sets.mtriple_set",
            ["a"],
            "has to be a list of lists of texts",
        ),
        ("dart", "tripleset", [["a", 1]], "tripleset is .*has to be a list of lists of texts"),
        ("dart", "annotations.text", [""], "annotations.text is .*none of them empty"),
        ("dart", "annotations.text", ["one"], "annotations has 2 sources for 1 texts"),
        ("dart", "annotations", ..., "lacks column annotations"),
        ("dolly", "instruction", "", "instruction is '', but has to be a text that is not empty"),
        ("dolly", "context", 3, "context is 3, but has to be a text"),
        ("dolly", "response", " ", "response is ' ', but has to be a text that is not empty"),
        ("dolly", "category", ..., "lacks column category"),
    ],
)
def test_bad_row_is_refused(
    name: str,
    path: str,
    value: Any,
    message: str,
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"],
    tmp_path: Path,
) -> None:
    write_all(tmp_path, name, test=[changed(ROWS[name]("fox"), path, value)])
    with pytest.raises(DataError, match=message):
        load(task_of(name), tmp_path, tokenizers)


def test_bad_row_is_named_by_set_split_and_number(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, "samsum", test=[samsum("a"), samsum("b") | {"summary": ""}])
    with pytest.raises(DataError, match=r"samsum \(test\), row 2: summary is ''"):
        load(task_of("samsum"), tmp_path, tokenizers)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_broken_line_is_refused(
    name: str, tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, name, test=json.dumps(ROWS[name]("fox")) + "\n{broken")
    with pytest.raises(DataError, match=r"test.jsonl, line 2: not valid JSON"):
        load(task_of(name), tmp_path, tokenizers)


def test_set_without_train_is_refused(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write(tmp_path, "dart", validation=[dart("fox")])
    with pytest.raises(DataError, match="dart has no train split, only validation"):
        load(task_of("dart"), tmp_path, tokenizers)


def test_empty_split_is_refused(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, "dart", test=[])
    with pytest.raises(DataError, match="dart: split test is empty"):
        load(task_of("dart"), tmp_path, tokenizers)


# --- splits, limits and the rows of this package


def test_split_seed_decides_what_is_held_out(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write(tmp_path, "fpb", train=[fpb(f"share {i}") for i in range(40)])
    reports = [
        [
            row["input_ids"].tolist()
            for row in load(task_of("fpb"), tmp_path, tokenizers, split_seed=seed).report.rows
        ]
        for seed in (0, 0, 1)
    ]
    assert reports[0] == reports[1] != reports[2]
    assert len(reports[0]) == 4


def test_limits_count_texts_and_are_named(
    tokenizers: dict[Objective, "PreTrainedTokenizerBase"], tmp_path: Path
) -> None:
    write_all(tmp_path, "dart", test=[dart("fox"), dart("jay")])
    task = task_of("dart", max_train_rows=3, max_eval_rows=1)
    data = load(task, tmp_path, tokenizers)
    assert len(data.train.rows) == 3
    assert (data.report.name, len(data.report.rows)) == ("first 1 of test", 1)
    assert data.selection.name == "first 1 of validation"


@pytest.mark.parametrize("name", sorted(TEXT_SETS))
def test_package_has_rows_of_every_set(
    name: str, tokenizers: dict[Objective, "PreTrainedTokenizerBase"]
) -> None:
    task = dataclasses.replace(composed(f"task={name}").config.task, max_length=400)
    data = load(task, "builtin", tokenizers)
    is_whole = name == "fpb"
    assert data.report.name == ("10 % of train" if is_whole else "test")
    assert len(data.report.rows) >= (2 if is_whole else 8)
    assert len(data.train.rows) >= 21
    every = [*data.train.rows, *data.selection.rows, *data.report.rows]
    pairs = Counter(
        (tuple(row["input_ids"].tolist()), tuple(row["labels"].tolist())) for row in every
    )
    assert max(pairs.values()) == 1
    if name == "dolly":  # every user learns and is scored, so that tables of users are full
        for split in (data.train, data.report):
            assert {row["user"] for row in split.rows} == set(CATEGORY_OPENINGS)
