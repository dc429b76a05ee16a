"""Whole runs: what they write, what the summary says, what they refuse, and that they learn."""

import dataclasses
import json
import logging
import math
import re
import struct
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cola
from cola.checkpoint import load_state
from cola.config.choices import MergeMode
from cola.config.identity import CONFIG_FILE, config_hash, load_config
from cola.errors import ConfigError, OffloadError, SiteError, TrainingError
from cola.experiment import run_experiment
from cola.tracking import read_samples
from tests.runs import CONSTANT_RATE, Run, config_of, run, small_synthetic, write_rows

SYNTHETIC = ("task=synthetic", "trainer.batch_size=16")
DIGITS = ("task=digits", "task.max_train_rows=320", "trainer.batch_size=32")


@pytest.fixture(autouse=True)
def _small():
    with small_synthetic():
        yield


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Run:
    """A run with everything switched on that writes something."""
    with small_synthetic():
        return run(
            tmp_path_factory.mktemp("outputs") / "full", *SYNTHETIC, "offload=cpu",
            "merge=merged", "trainer.max_steps=7", "trainer.interval=3", "trainer.log_every=2",
            "trainer.eval_every=3", "checkpoint.every=2", "checkpoint.keep=2", draws=True,
        )  # fmt: skip


# What a run writes -------------------------------------------------------------------------------


def test_folder_holds_everything(full):
    found = {str(p.relative_to(full.folder)) for p in full.folder.rglob("*") if p.is_file()}
    state = ("state.json", "tensors.safetensors")
    assert found == {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "base.safetensors",
        "figures/learning_curve.png",
        "adapters/adapters.json",
        "adapters/adapters.safetensors",
        "adapters/peft/adapter_config.json",
        "adapters/peft/adapter_model.safetensors",
        *(f"checkpoints/{name}/{part}"
          for name in ("best", "step-00000006", "step-00000007") for part in state),
    }  # fmt: skip


def test_config_is_the_one_that_ran(full):
    stored = load_config(full.folder / CONFIG_FILE)
    assert stored.merge.mode is MergeMode.merged
    assert stored.optimizer.lr == 3e-3  # defaults are filled in
    assert config_hash(stored) == full.summary["run"]["config_hash"]


def test_figure_is_a_picture_with_curves(full):
    data = (full.folder / "figures" / "learning_curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (770, 440)
    from matplotlib import image

    pixels = image.imread(full.folder / "figures" / "learning_curve.png")[..., :3]
    for colour in ([0, 0x72, 0xB2], [0xD5, 0x5E, 0]):  # loss, selection
        assert (np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.01).sum() > 100


def test_metrics_have_a_line_per_logged_step(full):
    assert [row["step"] for row in full.rows if "train/loss" in row] == [2, 4, 6, 7]
    assert [row["step"] for row in full.rows if "selection/accuracy" in row] == [3, 6, 7]


METRIC_KEYS = frozenset({
    "step", "train/loss", "train/epoch", "train/learning_rate", "time/base_seconds",
    "time/stall_seconds", "time/offload_seconds", "time/iteration_seconds", "wire/bytes_per_step",
    "memory/cpu_peak_mib", "memory/cpu_adapters_mib", "memory/cpu_optimizer_mib",
    "memory/cpu_staging_mib", "memory/cpu_base_model_mib", "memory/cpu_pristine_mib",
    "memory/cpu_merged_mib", "memory/base_device_peak_mib", "memory/resident_mib",
})  # fmt: skip


def test_metrics_name_their_units(full):
    rows = {frozenset(row) for row in full.rows}
    users = {f"selection/user/{user}/accuracy" for user in full.summary["result"]["by_user"]}
    selection = {f"selection/{name}" for name in ("accuracy", "loss", "tokens_per_second")}
    assert rows == {METRIC_KEYS, frozenset({"step"} | selection | users)}


@pytest.mark.parametrize(("method", "warns"), [("cola", True), ("lora", False)])
def test_adapters_that_the_host_cannot_hold_are_warned_of(tmp_path, monkeypatch, caplog, method,
                                                          warns):  # fmt: skip
    """What is free is not always told: the run goes on."""
    monkeypatch.setattr("cola.shortage.free_host_bytes", lambda: 10_000)
    done = run(tmp_path, *SYNTHETIC, f"method={method}", "trainer.max_steps=1")
    assert done.summary["steps"] == 1
    message = "this run may not fit: it needs"
    assert any(message in line and "GiB are free" in line for line in caplog.messages) == warns


def test_metrics_say_what_rounding_lost_in_bfloat16(tmp_path):
    done = run(tmp_path, *SYNTHETIC, "model.dtype=bfloat16", "merge=merged", "trainer.max_steps=2",
               "trainer.log_every=1")  # fmt: skip
    assert 0 < done.rows[1]["merge/lost_share"] < 1


def test_wire_counts_what_travels(full):
    # x and gradient leave every step, merged weights come back once per adaptation.
    assert full.summary["wire_bytes_per_step"] > 0
    assert full.rows[-2]["wire/bytes_per_step"] > 0


# Summary -----------------------------------------------------------------------------------------

SUMMARY = {
    "run": {
        "id": str,
        "seed": int,
        "config_hash": str,
        "commit": (str, type(None)),
        "versions": {
            "cola": str, "python": str, "torch": str, "transformers": str, "peft": str,
            "datasets": str, "hydra-core": str,
        },
        "machine": {"system": str, "processor": str, "threads": int, "gpus": list},
    },
    "model": str,
    "task": str,
    "method": str,
    "adapter": str,
    "merge": str,
    "users": str,
    "num_users": int,
    "offload": str,
    "result": {
        "metric": str,
        "value": float,
        "split": str,
        "selected_on": str,
        "selected_step": int,
        "selection_value": float,
        "scores": {"test": {"accuracy": float, "loss": float}},
        "by_user": dict,
        "tokens_per_second": float,
        "merge": str,
        "unmerged": type(None),
        "merged": {"scores": {"test": {"accuracy": float, "loss": float}}, "by_user": dict},
    },
    "trainable_parameters": int,
    "sites": int,
    "steps": int,
    "adaptations": int,
    "peak_mib": {"cpu": float},
    "evaluation_peak_mib": {"cpu": float},
    "base_seconds": float,
    "offload_seconds": float,
    "stall_seconds": float,
    "iteration_seconds": float,
    "wire_bytes_per_step": float,
    "evaluation_seconds": float,
    "wall_seconds": float,
}  # fmt: skip


def assert_shape(found, wanted, path="summary"):
    if not isinstance(wanted, dict):
        assert isinstance(found, wanted), path
        return
    assert list(found) == list(wanted), path
    for key, value in wanted.items():
        assert_shape(found[key], value, f"{path}.{key}")


def test_summary_keys_are_pinned(full):
    stored = json.loads((full.folder / "summary.json").read_text())
    assert stored == full.summary
    assert_shape(stored, SUMMARY)


def test_summary_states_the_run(full):
    summary = full.summary
    names = ("model", "task", "method", "adapter", "merge", "users", "offload")
    assert [summary[name] for name in names] == [
        "tiny-roberta", "synthetic", "cola", "lowrank", "merged", "one", "cpu",
    ]  # fmt: skip
    assert (summary["run"]["id"], summary["run"]["seed"]) == ("full", 0)
    assert summary["run"]["versions"]["cola"] == cola.__version__
    assert (summary["sites"], summary["steps"], summary["adaptations"]) == (6, 7, 3)
    assert summary["num_users"] == 1  # the rows' users are only scored apart
    assert summary["result"]["merge"] == "merged"
    assert summary["trainable_parameters"] == 4 * 2 * 8 * 64 + 64 * 65 + 2 * 65


@pytest.mark.parametrize(
    ("overrides", "adapter"), [(("method=lora",), "lowrank"), (("method=ft",), None)]
)
def test_summary_of_a_baseline_names_no_merge_or_offload(tmp_path, overrides, adapter):
    summary = run(tmp_path, *SYNTHETIC, *overrides, "trainer.max_steps=1").summary
    assert (summary["adapter"], summary["merge"], summary["offload"]) == (adapter, None, None)
    assert [summary["result"][key] for key in ("merge", "unmerged", "merged")] == [None] * 3
    assert (tmp_path / "adapters").exists() == (adapter is not None)


def test_summary_names_both_splits(full, tmp_path):
    result = full.summary["result"]
    assert (result["split"], result["selected_on"]) == ("test", "validation")
    digits = run(tmp_path, *DIGITS, "trainer.max_steps=1").summary["result"]
    assert digits["split"] == "test (stratified 20 %)"
    assert digits["selected_on"] == "10 % of the first 320 rows of train"


def test_selection_on_test_says_so(tmp_path):
    result = run(tmp_path, *SYNTHETIC, "evaluation.select_on=test", "trainer.max_steps=2").summary[
        "result"
    ]
    assert result["selected_on"] == result["split"] == "test"
    assert result["selection_value"] == result["value"]


# Length, intervals, evaluation -------------------------------------------------------------------


def test_max_steps_win_over_epochs(tmp_path):
    summary = run(tmp_path, *SYNTHETIC, "trainer.epochs=9", "trainer.max_steps=3").summary
    assert (summary["steps"], summary["adaptations"]) == (3, 3)


def test_epochs_count_partial_batches(tmp_path):
    done = run(tmp_path, *SYNTHETIC, "trainer.epochs=2", "task.max_train_rows=40")
    assert done.summary["steps"] == 2 * 3  # 16 + 16 + 8 rows
    assert [row["step"] for row in done.rows if "selection/loss" in row] == [3, 6]
    assert done.rows[-2]["train/epoch"] == 2.0


def test_partial_last_interval_is_fitted(tmp_path):
    # Constant rate: the runs agree up to step 6, and only the tail of one batch tells them apart.
    settings = (*SYNTHETIC, *CONSTANT_RATE, "trainer.interval=3")
    six, seven = (run(tmp_path / str(n), *settings, f"trainer.max_steps={n}") for n in (6, 7))
    assert (six.summary["adaptations"], seven.summary["adaptations"]) == (2, 3)
    for name, tensor in six.adapters.items():
        assert not torch.equal(tensor, seven.adapters[name]), name


def test_rate_reaches_its_end_at_any_interval(tmp_path):
    rates = [
        run(tmp_path / str(i), *SYNTHETIC, f"trainer.interval={i}", f"trainer.max_steps={i * 4}",
            "trainer.log_every=1").rows[-2]["train/learning_rate"]
        for i in (1, 4)
    ]  # fmt: skip
    assert rates[0] == rates[1] == pytest.approx(3e-3 / 3)


def test_best_parameters_are_reported_and_exported(tmp_path, monkeypatch):
    from cola import trainer

    true, values = trainer.evaluate, iter([0.9, 0.1, 0.5])

    def fall(*arguments, **settings):
        found = true(*arguments, **settings)
        accuracy = next(values, found.scores["accuracy"])
        return dataclasses.replace(found, scores={**found.scores, "accuracy": accuracy})

    settings = (*SYNTHETIC, *CONSTANT_RATE, "trainer.eval_every=2")
    short = run(tmp_path / "short", *settings, "trainer.max_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", fall)
        long = run(tmp_path / "long", *settings, "trainer.max_steps=6")
    result = long.summary["result"]
    assert (result["selected_step"], result["selection_value"]) == (2, 0.9)
    assert long.adapter_bytes == short.adapter_bytes
    assert result["scores"] == short.summary["result"]["scores"]


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "merge"), [("lowrank", "unmerged"), ("linear", "merged")])
def test_evaluation_may_merge_otherwise_than_training(tmp_path, adapter, merge):
    other = {"unmerged": "merged", "merged": "unmerged"}[merge]
    settings = (*SYNTHETIC, f"adapter={adapter}", f"merge={merge}", "trainer.max_steps=4",
                "trainer.eval_every=2", "trainer.log_every=1")  # fmt: skip
    auto = run(tmp_path / "auto", *settings)
    crossed = run(tmp_path / "crossed", *settings, f"evaluation.merge={other}")
    assert crossed.losses == pytest.approx(auto.losses, abs=1e-5)
    wanted, found = (done.summary["result"]["scores"]["test"] for done in (auto, crossed))
    assert found == pytest.approx(wanted, abs=1e-5)


def test_report_may_have_both_ways(tmp_path, caplog):
    settings = (*SYNTHETIC, "users=alone", "trainer.max_steps=3", "trainer.interval=3")
    with caplog.at_level(logging.INFO):
        both = run(tmp_path / "both", *settings, "evaluation.merge=both").summary["result"]
    merged = run(tmp_path / "merged", *settings, "evaluation.merge=merged").summary["result"]
    assert (both["merge"], merged["merge"]) == ("unmerged", "merged")
    assert both["unmerged"] == {key: both[key] for key in ("scores", "by_user")}
    assert both["merged"] == merged["merged"] == {k: merged[k] for k in ("scores", "by_user")}
    assert both["merged"]["scores"] != both["unmerged"]["scores"]
    assert merged["unmerged"] is None
    lines = [line for line in caplog.messages if "on test" in line]
    assert ["(unmerged, best" in lines[0], "(merged, best" in lines[1]] == [True, True]


def test_selection_of_other_users_begins_anew(tmp_path, monkeypatch):
    from cola import trainer

    true = trainer.evaluate
    looks = iter([(0.9, "ab"), (0.1, "abc"), (0.5, "abc"), (0.4, "abc"), (0.2, "bc"), (0.1, "bc")])

    def come_and_go(*arguments, **settings):
        found = true(*arguments, **settings)
        accuracy, users = next(looks, (0.0, ""))
        by_user = {user: {"accuracy": 0.0} for user in users}
        return dataclasses.replace(found, scores={"accuracy": accuracy}, by_user=by_user)

    monkeypatch.setattr(trainer, "evaluate", come_and_go)
    steps = ("trainer.eval_every=1", "checkpoint.every=1", "checkpoint.keep=9")
    done = run(tmp_path, *SYNTHETIC, *steps, "trainer.max_steps=6")
    states = [peek_step(done, step) for step in range(1, 7)]
    assert [state["best_step"] for state in states] == [1, 2, 3, 3, 5, 5]
    users = ["".join(state["best_users"]) for state in states]
    assert users == ["ab", "abc", "abc", "abc", "bc", "bc"]
    assert done.summary["result"]["selection_value"] == 0.2


def peek_step(done: Run, step: int) -> dict[str, Any]:
    """What a run knew of its progress after a step."""
    path = done.folder / "checkpoints" / f"step-{step:08d}"
    state: dict[str, Any] = load_state(path)["progression"]
    return state


# Users -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("users", ["joint", "alone"])
def test_summary_and_metrics_count_users(tmp_path, users, caplog):
    named = ("users.names=[open_qa,closed_qa,general_qa]", "users.others=drop")
    settings = (f"users={users}", *named, "trainer.max_steps=2", "trainer.eval_every=1")
    with caplog.at_level(logging.INFO):
        done = run(tmp_path, *SYNTHETIC, *settings)
    assert (done.summary["users"], done.summary["num_users"]) == (users, 3)
    assert list(done.summary["result"]["by_user"]) == ["open_qa", "closed_qa", "general_qa"]
    assert {key for key in done.rows[0] if "user" in key} == {
        f"selection/user/{user}/accuracy" for user in ("open_qa", "closed_qa", "general_qa")
    }
    (line,) = [line for line in caplog.messages if "K = 3" in line]
    assert re.fullmatch(
        rf"users={users}, K = 3; rows to train on: open_qa \d+, closed_qa \d+, general_qa \d+", line
    )


def test_start_of_a_run_lists_ten_users(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(tmp_path, *DIGITS, "users=joint", "users.num=12", "trainer.max_steps=1")
    (line,) = [line for line in caplog.messages if "K = 12" in line]
    assert line.endswith(", user10 24 and 2 more")


def test_user_that_left_is_neither_scored_nor_selected_by(tmp_path):
    done = run(tmp_path, *SYNTHETIC, "users=alone", "users.names=[open_qa,closed_qa]",
               "users.others=drop", "users.schedule=[{user:open_qa,leave:2}]",
               "trainer.max_steps=2", "trainer.eval_every=1")  # fmt: skip
    users = [{key.split("/")[2] for key in row if "user" in key} for row in done.rows]
    assert [found for found in users if found] == [{"open_qa", "closed_qa"}, {"closed_qa"}]
    result = done.summary["result"]
    assert (result["selected_step"], list(result["by_user"])) == (2, ["closed_qa"])


def test_every_user_gets_a_folder_of_adapters(tmp_path):
    names = ["open_qa", "general_qa"]
    adapters = "users.adapters=[{user:general_qa,alpha:2.0,rank:4}]"
    done = run(tmp_path, *SYNTHETIC, "users=alone", f"users.names=[{','.join(names)}]", adapters,
               "users.others=drop", "trainer.max_steps=2")  # fmt: skip
    folder = done.folder / "adapters"
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    described = [json.loads((folder / name / "adapters.json").read_text()) for name in names]
    assert [one["scale"] for one in described] == [1.0, 2.0]
    peft = [json.loads((folder / n / "peft" / "adapter_config.json").read_text()) for n in names]
    assert [(one["r"], one["lora_alpha"]) for one in peft] == [(8, 8.0), (4, 8.0)]
    first, second = (load_file(folder / name / "adapters.safetensors") for name in names)
    assert first.keys() == second.keys()
    assert [first[key].shape != second[key].shape for key in first].count(True) == 8


def test_folder_of_a_user_is_named_like_the_user_as_far_as_it_can(tmp_path):
    rows = [{"text": f"fox {i}", "label": "ab"[i % 2], "who": ["a/b", ".x y"][i // 2 % 2]}
            for i in range(24)]  # fmt: skip
    for split in ("train", "test"):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "run", "task=jsonl", "model=tiny-roberta", "task.target=label", "users=alone",
        f"task.train_file={tmp_path}/train.jsonl", f"task.test_file={tmp_path}/test.jsonl",
        "task.user=who", 'task.template="{text}"', "trainer.max_steps=1")  # fmt: skip
    found = {path.name for path in (tmp_path / "run" / "adapters").iterdir()}
    assert found == {"a%2Fb", ".x y"}


def test_bases_start_equal_whatever_the_method(tmp_path):
    losses = {
        run(tmp_path / name, *SYNTHETIC, *overrides, "trainer.max_steps=1").losses[0]
        for name, overrides in {
            "lowrank": (), "linear": ("adapter=linear",), "mlp": ("adapter=mlp",),
            "lora": ("method=lora",), "ft": ("method=ft",),
        }.items()
    }  # fmt: skip
    assert len(losses) == 1


# Every cell runs ---------------------------------------------------------------------------------

CELLS = [
    *((f"adapter={a}", f"merge={m}") for a in ("lowrank", "linear") for m in MergeMode.__members__),
    ("adapter=mlp", "merge=unmerged"),
    ("adapter=mlp", "merge=detached"),
    ("method=lora",),
    ("method=ft",),
]


@pytest.fixture(scope="module")
def stsb(tmp_path_factory):
    """A small STS-B: (sentences, similarity from 0 to 5)."""
    folder = tmp_path_factory.mktemp("data")
    words = ["cat", "dog", "hammer", "saw", "the", "red"]
    for split, num in (("train", 40), ("validation", 12)):
        rows = [
            {"sentence1": words[i % 6], "sentence2": words[i % 5], "label": i % 6 / 1.2}
            for i in range(num)
        ]
        write_rows(folder / "glue" / "stsb" / f"{split}.jsonl.gz", rows)
    return folder


TASKS = ("classification", "regression", "causal", "image")
# `slow` has the rest, and `smoke` has every task with every method.
OFTEN = (("adapter=linear", "merge=merged"), ("adapter=mlp", "merge=unmerged"))


def _cells() -> list[Any]:
    return [
        pytest.param(
            task,
            cell,
            id=" ".join([task, *cell]),
            marks=() if task == TASKS[0] and cell in OFTEN else pytest.mark.slow,
        )
        for task in TASKS
        for cell in CELLS
    ]


@pytest.mark.parametrize(("task", "cell"), _cells())
def test_cell_runs(tmp_path, stsb, task, cell):
    settings = {
        "classification": SYNTHETIC,
        "regression": ("task=glue", "task.subset=stsb", "model=tiny-roberta", f"data_dir={stsb}",
                       "trainer.batch_size=16"),
        "causal": (*SYNTHETIC, "model=tiny-gpt2", "generation.max_new_tokens=4"),
        "image": (*DIGITS, "model=cnn", "model.architecture.channels=[8,16]"),
    }[task]  # fmt: skip
    done = run(tmp_path, *settings, *cell, "trainer.max_steps=2", "trainer.log_every=1")
    metric = {"regression": "pearson", "causal": "rougeL"}.get(task, "accuracy")
    assert done.summary["result"]["metric"] == metric
    assert all(map(math.isfinite, done.losses))
    assert done.losses[0] != done.losses[1]


# Evaluation aside --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [2.0, 60.0])
def test_peaks_of_training_and_evaluation_do_not_mix(tmp_path, monkeypatch, training):
    from cola import trainer

    peak = {"mib": training}
    true = trainer.evaluate

    def heavy(*arguments, **settings):
        peak["mib"] = max(peak["mib"], 50.0)
        return true(*arguments, **settings)

    monkeypatch.setattr(trainer, "peak_mib", lambda held: {"cpu": peak["mib"]})
    monkeypatch.setattr(trainer, "reset_peaks", lambda devices: peak.update(mib=1.0))
    monkeypatch.setattr(trainer, "evaluate", heavy)
    # An evaluation at every step: training peaks are reached before, between and after them.
    settings = ("trainer.max_steps=3", "trainer.eval_every=1", "trainer.log_every=1")
    done = run(tmp_path, *SYNTHETIC, *settings)
    assert done.summary["peak_mib"] == {"cpu": training}
    assert done.summary["evaluation_peak_mib"] == {"cpu": 50.0}
    logged = [row for row in done.rows if "train/loss" in row]
    for key in ("memory/cpu_peak_mib", "memory/base_device_peak_mib"):
        assert {row[key] for row in logged} == {training}


def test_seconds_of_evaluation_are_summed_apart(tmp_path, monkeypatch):
    import time

    from cola import trainer

    true = trainer.evaluate

    def slow(*arguments, **settings):
        time.sleep(0.05)
        return true(*arguments, **settings)

    monkeypatch.setattr(trainer, "evaluate", slow)
    summary = run(tmp_path, *SYNTHETIC, "trainer.max_steps=2", "trainer.eval_every=1").summary
    assert summary["evaluation_seconds"] >= 3 * 0.05  # two selections and the report
    assert summary["iteration_seconds"] < 0.05


def test_samples_of_selection_and_report_are_kept(full):
    rows = read_samples(full.folder)
    splits = [(row["step"], row["split"]) for row in rows]
    best = full.summary["result"]["selected_step"]
    expected = [(3, "validation"), (6, "validation"), (7, "validation"), (best, "test")]
    assert splits == [pair for pair in expected for _ in range(8)]
    assert set(rows[0]) == {"step", "split", "input", "prediction", "reference", "user"}
    assert rows[0]["prediction"] in ("animals", "tools")
    assert rows[0]["input"].startswith("category ")


# Refusals and failures ---------------------------------------------------------------------------


def test_loss_that_is_no_number_ends_a_run_with_its_step(tmp_path):
    settings = (*SYNTHETIC, "method=ft", "optimizer.name=sgd", "optimizer.lr=1e30")
    with pytest.raises(
        TrainingError,
        match=r"training loss is (nan|inf) at step [23]: lower optimizer\.lr \(1e\+30\)",
    ):
        run(tmp_path, *settings, *CONSTANT_RATE, "trainer.max_steps=6", "trainer.log_every=1")
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_gradient_that_is_no_number_ends_a_run_with_its_site(tmp_path, offload):
    settings = (*SYNTHETIC, "optimizer.name=sgd", "optimizer.lr=1e30", f"offload={offload}")
    with pytest.raises(
        (OffloadError, TrainingError),
        match=r"adaptation [23]: the hidden gradient of site '.+' is not finite"
        r"|training loss is (nan|inf) at step [23]",
    ):
        run(tmp_path, *settings, *CONSTANT_RATE, "trainer.max_steps=6", "trainer.log_every=1")


@pytest.mark.parametrize("where", ["merge=merged", "evaluation.merge=merged"])
def test_shared_weight_is_refused_when_merging(tmp_path, where):
    config = config_of(*SYNTHETIC, "model=tiny-gpt2", "model.sites=[c_attn,lm_head]", where)
    with pytest.raises(SiteError, match=r"\['lm_head'\] share their weight with another module"):
        run_experiment(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shared_weight_is_adapted_when_unmerged(tmp_path):
    sites = "model.sites=[c_attn,lm_head]"
    done = run(tmp_path, *SYNTHETIC, "model=tiny-gpt2", sites, "trainer.max_steps=2")
    assert done.summary["sites"] == 3


@pytest.mark.parametrize("method", ["cola", "lora"])
def test_rank_above_a_layer_is_refused_with_its_sites(tmp_path, method):
    config = config_of("task=digits", f"method={method}", "adapter.rank=20")
    with pytest.raises(
        ConfigError, match=r"adapter.rank=20 is above the smaller side of linear3 \(10\)"
    ):
        run_experiment(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rank_has_no_say_for_other_adapters(tmp_path):
    run(tmp_path, *DIGITS, "adapter=linear", "adapter.rank=20", "trainer.max_steps=1")


# Learning ----------------------------------------------------------------------------------------


def test_digits_loss_halves_within_50_steps(tmp_path):
    # Ten times the default rate, which is made for 60 epochs.
    settings = ("task=digits", "optimizer.lr=0.3", "trainer.max_steps=50", "trainer.log_every=1")
    losses = run(tmp_path, *settings).losses
    assert sum(losses[-5:]) / 5 < losses[0] / 2
