"""Users as the data names them, and rows that cannot be read: whom they stop."""

import json
from pathlib import Path
from typing import Any

import pytest

from cola.config.choices import Family
from cola.config.schema import TaskConfig
from cola.errors import ConfigError, DataError
from cola.experiment import build_base_and_task
from cola.models.tokenizer import build_word_tokenizer
from cola.synthetic_language import CATEGORY_OPENINGS
from cola.task_data import Split, TaskData
from cola.tasks import hub, load_task, resolve_problem
from tests.runs import config_of, write_rows

CATEGORIES = tuple(CATEGORY_OPENINGS)

# Columns of the data -----------------------------------------------------------------------------


SETTINGS = {
    "dolly": {"folder": "databricks-dolly-15k"},
    "glue": {"folder": "glue/sst2", "subset": "sst2", "num_labels": 2},
    "jsonl": {"target": "label", "num_labels": 0},
    "synthetic": {"num_labels": 2},
    "digits": {"num_labels": 10, "image_shape": [1, 8, 8]},
}


def load(name: str, data_dir: Path | None, *, family: Family = Family.encoder, column: str | None,
         isolates: bool = False, **settings: Any) -> TaskData:  # fmt: skip
    task = TaskConfig(name=name, **SETTINGS[name] | settings)
    return load_task(
        task,
        resolve_problem(task, family),
        tokenizer=build_word_tokenizer(marks_ends=True, padding_side="right"),
        score=lambda **_: {},
        data_dir=None if data_dir is None else str(data_dir),
        split_seed=0,
        decoder_start_id=2,
        user_column=column,
        isolates_users=isolates,
    )


def users_of(split: Split) -> list[str]:
    return [row["user"] for row in split.rows]


DOLLY = "databricks-dolly-15k"
FAMILY = {"dolly": Family.decoder, "glue": Family.encoder, "jsonl": Family.encoder}


def dolly(who: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"instruction": f"fox {number}", "context": "", "response": "jay", "category": who}
    return row | {"annotator": len(who)} | changes


def write_dolly(folder: Path, *rows: dict[str, Any]) -> None:
    write_rows(folder / DOLLY / "train.jsonl.gz", list(rows))
    for split in ("validation", "test"):
        write_rows(folder / DOLLY / f"{split}.jsonl.gz", [dolly("open_qa", 99)])


def sst2(*users: Any, **changes: Any) -> list[dict[str, Any]]:
    return [{"sentence": f"fox {i}", "label": i % 2, "who": u} for i, u in enumerate(users)]


def write_sst2(folder: Path, train: list[dict[str, Any]], report: list[dict[str, Any]]) -> None:
    write_rows(folder / "glue" / "sst2" / "train.jsonl.gz", train)
    write_rows(folder / "glue" / "sst2" / "validation.jsonl.gz", report)


def own_rows(*users: Any) -> list[dict[str, Any]]:
    return [{"text": f"fox {i}", "label": "ab"[i % 2], "who": u} for i, u in enumerate(users)]


def write_own(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_text_set_takes_users_from_another_column(tmp_path):
    write_dolly(tmp_path, dolly("open_qa"), dolly("general_qa"))
    own, other = (
        load("dolly", tmp_path, family=Family.decoder, column=column)
        for column in (None, "annotator")
    )
    assert (users_of(own.train), own.users) == (["open_qa", "general_qa"], CATEGORIES)
    assert (users_of(other.train), other.users) == (["7", "10"], ())
    assert users_of(other.report) == ["7"]


def test_glue_takes_users_from_a_column(tmp_path):
    write_sst2(tmp_path, sst2("x", "y", "x", "y"), sst2("x", 7))
    task = load("glue", tmp_path, column="who")
    assert sorted([*users_of(task.train), *users_of(task.selection)]) == ["x", "x", "y", "y"]
    assert users_of(task.report) == ["x", "7"]
    plain = load("glue", tmp_path, column=None)
    assert "user" not in plain.train.rows[0]


def test_hub_rows_take_users_from_a_column(monkeypatch):
    from datasets import Dataset

    tables = {split: Dataset.from_list(sst2("x", "y", "x")) for split in ("train", "validation")}
    monkeypatch.setattr(hub, "_load_split", lambda task, split: tables[split])
    task = load("glue", None, column="who")
    assert users_of(task.report) == ["x", "y", "x"]
    message = r"hub set .* \(train\) lacks column usr; it has sentence, label, who"
    with pytest.raises(DataError, match=message):
        load("glue", None, column="usr")


@pytest.mark.parametrize(("key", "column"), [("who", None), (None, "who"), ("who", "who")])
def test_own_rows_take_users_from_either_setting(tmp_path, key, column):
    rows = own_rows(*"uvuvuvuv")
    files = {f"{split}_file": write_own(tmp_path, split, rows) for split in ("train", "test")}
    task = load("jsonl", None, column=column, user=key, **files)
    assert users_of(task.report) == [*"uvuvuvuv"]


def test_own_rows_refuse_two_columns_of_users(tmp_path):
    file = write_own(tmp_path, "train", own_rows(*"uvuv"))
    message = "task.user=who and users.column=text: both name the column of a row's user; leave one"
    with pytest.raises(ConfigError, match=message):
        load("jsonl", None, column="text", user="who", train_file=file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dolly", r".*jsonl.gz, line 1: lacks column usr; it has instruction, .*annotator"),
        ("glue", r"train.jsonl.gz, line 1: lacks column usr; it has sentence, label, who"),
        ("jsonl", r"line 1: no column 'usr' \(users.column\); choose one of text, label, who"),
    ],
)
def test_column_that_the_data_lacks_is_refused(tmp_path, name, message):
    write_dolly(tmp_path, dolly("open_qa"))
    write_sst2(tmp_path, sst2("x", "y"), sst2("x"))
    file = write_own(tmp_path, "train", own_rows(*"uv"))
    settings = {"train_file": file} if name == "jsonl" else {}
    folder = None if name == "jsonl" else tmp_path
    with pytest.raises(DataError, match=message):
        load(name, folder, column="usr", family=FAMILY[name], **settings)


@pytest.mark.parametrize("value", [None, " ", True, 1.5])
def test_value_that_names_nobody_is_refused(tmp_path, value):
    write_sst2(tmp_path, sst2("x", value), sst2("x"))
    with pytest.raises(DataError, match=r"sst2 \(train\), row 2: who is .*the name of a user"):
        load("glue", tmp_path, column="who", isolates=True)


def test_built_in_sets_have_no_other_column():
    with pytest.raises(ConfigError, match=r"users.column=who: task=synthetic names users by cat"):
        load("synthetic", None, column="who")
    with pytest.raises(
        ConfigError, match=r"users.column=who: task=digits holds images, .*users.num"
    ):
        load("digits", None, family=None, column="who")


# Rows that cannot be read ------------------------------------------------------------------------


def test_bad_row_of_a_text_set_stops_only_its_user(tmp_path, caplog):
    good = [dolly(user, i) for i, user in enumerate(["open_qa", "closed_qa"] * 3)]
    lacking = {k: v for k, v in dolly("general_qa", 8).items() if k != "context"}
    write_dolly(tmp_path, *good, dolly("closed_qa", 7, response=" "), lacking)
    task = load("dolly", tmp_path, family=Family.decoder, column=None, isolates=True)
    assert users_of(task.train) == ["open_qa"] * 3
    assert task.bad_users == ("closed_qa", "general_qa")
    assert caplog.messages[0] == (
        "user closed_qa is left out of the run with 3 good rows, because of a bad one: dolly "
        "(train), row 7: response is ' ', but has to be a text that is not empty"
    )
    assert "general_qa is left out of the run with 0 good rows" in caplog.messages[1]
    assert "row 8: the row is {" in caplog.messages[1]
    assert caplog.messages[1].endswith("but has to be an object with a field context")


def test_bad_row_stops_the_run_where_users_share_adapters(tmp_path):
    write_dolly(tmp_path, dolly("open_qa"), dolly("closed_qa", response=" "))
    with pytest.raises(DataError, match=r"dolly \(train\), row 2: response is ' '"):
        load("dolly", tmp_path, family=Family.decoder, column=None)


def test_bad_row_of_nobody_stops_the_run(tmp_path):
    write_dolly(tmp_path, dolly("open_qa"), dolly("", response=" "))
    with pytest.raises(DataError, match=r"dolly \(train\), row 2: response is ' '"):
        load("dolly", tmp_path, family=Family.decoder, column=None, isolates=True)


@pytest.mark.parametrize("change", [{"label": 2}, {"label": None}, {"sentence": 5}])
def test_bad_row_of_glue_stops_only_its_user(tmp_path, change):
    report = sst2("x", "y", "z")
    write_sst2(tmp_path, sst2(*"xyzxyz" * 3), [report[0], report[1] | change, report[2]])
    task = load("glue", tmp_path, column="who", isolates=True)
    assert task.bad_users == ("y",)
    assert {*users_of(task.train), *users_of(task.selection)} == {"x", "z"}
    assert users_of(task.report) == ["x", "z"]


@pytest.mark.parametrize(
    "change", [{"label": "c"}, {"label": True}, {"label": ...}, {"text": " "}, {"text": ...}]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_own_row_stops_only_its_user(tmp_path, change, split):
    rows = own_rows(*"uvwuvwuvwuvw")
    bad = {k: v for k, v in (rows[1] | change).items() if v is not ...}
    files = {f"{s}_file": write_own(tmp_path, s, [*rows, bad] if s == split else rows)
             for s in ("train", "test")}  # fmt: skip
    settings: dict[str, Any] = {"template": "{text}", **files}
    if change == {"label": "c"}:
        settings["labels"] = ["a", "b"]
    task = load("jsonl", None, column="who", isolates=True, **settings)
    assert task.bad_users == ("v",)
    assert users_of(task.report) == [*"uw" * 4]
    assert {*users_of(task.train), *users_of(task.selection)} == {"u", "w"}
    with pytest.raises(DataError, match=rf"{split}.jsonl, line 13"):
        load("jsonl", None, column="who", **settings)


def test_run_without_a_good_user_is_refused(tmp_path):
    rows = [row | {"text": " "} for row in own_rows(*"uv")]
    file = write_own(tmp_path, "train", own_rows(*"uv") + rows)
    message = (
        "jsonl: no row of train is left without the 2 users who have a row that cannot be read, "
        r"the first one: .*train.jsonl, line 3: the filled template is empty"
    )
    with pytest.raises(DataError, match=message):
        load("jsonl", None, column="who", isolates=True, train_file=file, template="{text}")


def test_many_bad_users_are_counted(tmp_path, caplog):
    users = [f"u{i}" for i in range(13)]
    bad = [row | {"text": " "} for row in own_rows(*users)]
    file = write_own(tmp_path, "train", [*own_rows(*["good"] * 9), *bad])
    load("jsonl", None, column="who", isolates=True, train_file=file, template="{text}")
    warned = [message for message in caplog.messages if "left out" in message]
    assert len(warned) == 11
    assert warned[-1] == "3 more users are left out likewise"


def test_run_leaves_out_a_user_with_a_bad_row(tmp_path):
    rows = own_rows(*"uvwuvwuvwuvw")
    train = write_own(tmp_path, "train", [*rows, rows[1] | {"label": True}])
    test = write_own(tmp_path, "test", rows)
    config = config_of(
        "task=jsonl", "model=tiny-roberta", f"task.train_file={train}", "task.target=label",
        f"task.test_file={test}", "users=alone", "users.column=who", "users.names=[w,v,u]",
        'task.template="{text}"',
    )  # fmt: skip
    _, task = build_base_and_task(config)
    assert task.users == ("w", "u")
