"""Dashboards as code: they build offline, and show names that runs log."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from cola.metrics import _METRICS, build_score
from tests import fake_wandb
from tests.runs import run, small_synthetic

SCRIPTS = Path(__file__).parents[1] / "scripts"
USERS_RUN = (
    "task=synthetic", "model=tiny-gpt2", "users=alone", "offload=cpu", "tracking=wandb",
    "trainer.max_steps=2", "trainer.log_every=1", "trainer.eval_every=2",
    "generation.max_new_tokens=2",
)  # fmt: skip
SCORES = ("accuracy", "exact_match", "matthews_correlation", "pearson", "rougeL")


@pytest.fixture(scope="module")
def dashboards():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("wandb_dashboards")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """What a run with users sends: names of its numbers, summary and configuration."""
    folder = tmp_path_factory.mktemp("sent")
    with pytest.MonkeyPatch.context() as monkeypatch, small_synthetic():
        fake_wandb.clean(monkeypatch, folder / "home")
        wandb = fake_wandb.install(monkeypatch)
        run(folder / "r1", *USERS_RUN)
    logged = {name for values in wandb.run.logged for name in values}
    return {
        "logged": logged,
        "summary": {*dotted(wandb.run.summary), *kept(logged, wandb.run.defined)},
        "config": set(dotted(wandb.started[0]["config"])),
    }


def dotted(values, prefix=""):
    """Names of nested values as W&B joins them."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def kept(logged, defined):
    """Names that the summary has of logged numbers."""
    for name in logged:
        settings = defined.get(name) or defined.get(f"{name.split('/')[0]}/*", {})
        parts = (settings.get("summary") or "").split(",")
        yield from (f"{name}.{part}" if part else name for part in parts)


def is_sent(name, sent):
    if name.startswith("/"):
        return any(re.search(name.strip("/"), logged) for logged in sent["logged"])
    return name in sent["logged"] | sent["summary"]


def test_panels_show_what_runs_log(dashboards, sent):
    panels = [panel for section in dashboards.sections() for panel in section.panels]
    names = [name for panel in panels for name in dashboards.panel_names(panel)]
    assert len(names) > 30
    others = {f"selection/{score}" for score in SCORES} - {"selection/rougeL"}
    assert {name for name in names if not is_sent(name, sent)} == others


def test_columns_and_groups_are_what_runs_send(dashboards, sent):
    for column in dashboards.COLUMNS:
        section, _, name = column.partition(":")
        if section == "config":
            assert name.replace(".value", "", 1) in sent["config"]
        if section == "summary":
            assert is_sent(name, sent), column
    assert {f"labels.{label}" for label in dashboards.GROUPS} <= sent["config"]


def test_every_judged_score_has_its_curve():
    judged = []
    for name in _METRICS:
        writes = name in ("exact_match", "rouge_l")
        values = ["a", "b"] if writes else torch.tensor([0, 1])
        judged.append(next(iter(build_score(name)(predictions=values, references=values))))
    assert sorted(judged) == sorted(SCORES)


def test_views_read_back(dashboards, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wandb_dashboards.py", "--dry"])
    assert dashboards.main() == 0
    text = capsys.readouterr().out
    assert "both read back" in text
    assert "score against memory of the base device, MiB: memory/base_device_peak_mib.max" in text


def test_view_whose_json_loses_a_panel_is_refused(dashboards, monkeypatch):
    view = dashboards.build_workspace("e", "p")
    monkeypatch.setattr(type(view), "_from_model", lambda model: dashboards.ws.Workspace("e", "p"))
    with pytest.raises(ValueError, match="Workspace: its JSON does not read back"):
        dashboards.check(view)


def test_workspace_groups_seeds(dashboards):
    model = dashboards.build_workspace("e", "p")._to_model()
    (runs,) = json.loads(model.spec.model_dump_json(by_alias=True))["section"]["runSets"]
    assert [key["name"] for key in runs["grouping"]] == [
        "group", "labels.value.task", "labels.value.model", "labels.value.method"
    ]  # fmt: skip
    assert runs["runFeed"]["columnOrder"] == list(dashboards.COLUMNS)


def test_without_a_key_one_message_and_exit_code_2(dashboards, monkeypatch, tmp_path, capsys):
    fake_wandb.clean(monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "argv", ["wandb_dashboards.py"])
    with pytest.raises(SystemExit, match="2"):
        dashboards.main()
    assert "no Weights & Biases key: run `wandb login`" in capsys.readouterr().err


def test_both_are_saved_with_a_key(dashboards, monkeypatch, capsys):
    saved = []
    for kind in (dashboards.wr.Report, dashboards.ws.Workspace):
        monkeypatch.setattr(kind, "save", lambda view: saved.append(type(view).__name__))
        monkeypatch.setattr(kind, "url", f"https://wandb.ai/{kind.__name__}")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(sys, "argv", ["wandb_dashboards.py", "--entity", "team"])
    assert dashboards.main() == 0
    assert saved == ["Report", "Workspace"]
    assert capsys.readouterr().out.split() == [
        "https://wandb.ai/Report", "https://wandb.ai/Workspace"
    ]  # fmt: skip
