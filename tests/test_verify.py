"""`cola-verify` holds where gradient learning is exact, and finds where it is not."""

import pytest

from cola.cli import verify as command
from cola.cli.app import run_command
from cola.cli.outcome import BAD_CONFIG, DONE, FAILED
from cola.offload import user_fitter
from cola.offload.fitter import AdapterFitter
from cola.verify import Check, run_checks, verify
from tests.runs import config_of, small_synthetic

MODELS = {
    "tiny-roberta": ("task=synthetic", "model=tiny-roberta"),
    "tiny-gpt2": ("task=synthetic", "model=tiny-gpt2"),
    "cnn": ("task=digits", "model=cnn", "model.architecture.channels=[8,16,16,16]"),
}
EXACT = [
    ("lowrank", "unmerged"),
    ("linear", "unmerged"),
    ("mlp", "unmerged"),
    ("lowrank", "merged"),
    ("linear", "merged"),
]


@pytest.fixture(autouse=True)
def _small():
    with small_synthetic():
        yield


@pytest.mark.parametrize(("adapter", "merge"), EXACT)
@pytest.mark.parametrize(
    "model", ["tiny-roberta", pytest.param("tiny-gpt2", marks=pytest.mark.slow), "cnn"]
)
def test_every_site_is_exact(model, adapter, merge):
    config = config_of(*MODELS[model], f"adapter={adapter}", f"merge={merge}")
    checks = run_checks(config)
    assert [check for check in checks if not check.holds] == []


USERS = {
    "alone": ("users=alone", "users.kinds=[lowrank, linear, mlp]", "users.loss=per_user"),
    "federated": ("users=collaboration", "offload=cpu"),
    "exact": ("users=collaboration", "users.kinds=lowrank-linear", "users.gradient=exact"),
    "local": ("users=alone", "users.local=[open_qa]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("users", USERS)
def test_every_site_of_users_is_exact(users):
    checks = run_checks(config_of(*MODELS["tiny-gpt2"], *USERS[users]))
    assert len(checks) == 2  # sites; what is merged is no single row's model
    assert [check for check in checks if not check.holds] == []


def test_a_row_that_teaches_another_user_is_caught(monkeypatch):
    own = user_fitter.user_gradients

    def leaking(*args):
        return [{name: g + 1e-6 * g.roll(1, 0) for name, g in site.items()} for site in own(*args)]

    monkeypatch.setattr(user_fitter, "user_gradients", leaking)
    checks = run_checks(config_of(*MODELS["tiny-gpt2"], "users=alone"))
    assert not any(check.holds for check in checks)


@pytest.mark.parametrize(
    ("model", "adapter", "merge"),
    [("tiny-bart", "linear", "merged"), ("tiny-llama", "mlp", "unmerged")],
)
def test_every_site_of_models_that_write_is_exact(model, adapter, merge):
    settings = (f"model={model}", f"adapter={adapter}", f"merge={merge}", "model.sites=all")
    checks = run_checks(config_of("task=synthetic", *settings))
    assert len(checks) >= 14
    assert all(check.holds for check in checks)


@pytest.mark.parametrize(
    "overrides",
    [("offload=cpu",), ("adapter.alpha=3",), ("model.gradient_checkpointing=true",),
     ("trainer.interval=2",), ("merge=merged", "merge.pristine=base"),
     ("model.architecture.hidden_dropout_prob=0.1",)],
    ids=" ".join,
)  # fmt: skip
def test_every_site_is_exact_under_settings(overrides):
    checks = run_checks(config_of(*MODELS["tiny-roberta"], *overrides))
    assert all(check.holds for check in checks)


# Sites without an adapted site downstream: their hidden gradient does not pass any adapter.
LAST = {
    "tiny-roberta": {"classifier.out_proj"},
    "tiny-gpt2": {"transformer.h.1.attn.c_attn"},
    "cnn": {"linear"},
}


@pytest.mark.parametrize(
    ("model", "adapter"), [("tiny-roberta", "lowrank"), ("tiny-gpt2", "mlp"), ("cnn", "linear")]
)
def test_detached_differs_exactly_where_adapted_sites_follow(model, adapter):
    checks = run_checks(config_of(*MODELS[model], f"adapter={adapter}", "merge=detached"))
    gradients = [check for check in checks if "Proposition 2" not in check.name]
    assert {check.name for check in gradients if check.holds} == LAST[model]
    assert all(check.error > 1e-6 for check in gradients if not check.holds)


@pytest.mark.parametrize(("merge", "code"), [("unmerged", DONE), ("detached", FAILED)])
def test_command_exits_by_its_verdict(capsys, merge, code):
    arguments = [*MODELS["tiny-gpt2"], "device=cpu", f"merge={merge}"]
    assert run_command(command.COMMAND, arguments) == code
    assert ("DIFFERS" in capsys.readouterr().out) == (code == FAILED)


def make_wrong(monkeypatch, factor):
    """Multiplies what a fitter adds up of a site by factor(site)."""
    true = AdapterFitter._add

    def wrong(self, site, gradients, **settings):
        spoilt = {name: factor(site) * gradient for name, gradient in gradients.items()}
        true(self, site, spoilt, **settings)

    monkeypatch.setattr(AdapterFitter, "_add", wrong)


def test_wrong_gradient_is_caught(monkeypatch):
    make_wrong(monkeypatch, lambda site: 1.001)
    checks = run_checks(config_of(*MODELS["tiny-roberta"]))
    gradients = [check for check in checks if "Proposition 2" not in check.name]
    assert all(check.error == pytest.approx(1e-3) for check in gradients)
    assert not any(check.holds for check in gradients)


def test_wrong_gradient_of_one_site_is_named(monkeypatch, caplog):
    make_wrong(monkeypatch, lambda site: 2 if site == "linear2" else 1)
    checks = run_checks(config_of("task=digits"))
    assert [check.name for check in checks if not check.holds] == ["linear2"]
    assert not verify(config_of("task=digits"))
    assert "1 of 4 checks differ from autograd" in caplog.text


def test_wrong_merge_is_caught(monkeypatch):
    true = run_checks(config_of("task=digits", "adapter=linear"))
    monkeypatch.setattr("cola.adapters.LinearAdapter.delta_weight", lambda self: 1.1 * self.weight)
    checks = run_checks(config_of("task=digits", "adapter=linear"))
    assert all(check.holds for check in true)
    assert [check.name for check in checks if not check.holds] == [
        "logits, merged against unmerged (Proposition 2)"
    ]


def test_not_a_number_never_holds():
    assert not Check(name="site", error=float("nan")).holds


def test_same_seed_gives_the_same_errors():
    config = config_of("task=digits")
    assert run_checks(config) == run_checks(config)


@pytest.mark.parametrize("method", ["lora", "ft"])
def test_baseline_has_nothing_to_verify(capsys, method):
    assert run_command(command.COMMAND, ["task=synthetic", f"method={method}"]) == BAD_CONFIG
    message = f"cola-verify: method={method} is plain back-propagation already; "
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(("adapter", "proposition_2"), [("lowrank", 1), ("mlp", 0)])
def test_table_has_a_row_per_site(capsys, adapter, proposition_2):
    assert verify(config_of(*MODELS["tiny-roberta"], f"adapter={adapter}"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| site ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    sites = [
        f"roberta.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")
    ]
    sites += ["classifier.dense", "classifier.out_proj"]
    assert [row[0] for row in rows][: len(sites)] == sites
    assert len(rows) == len(sites) + proposition_2
    assert all(row[2] == "exact" for row in rows)
