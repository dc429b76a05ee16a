"""AdaLoRA's budget really moves: ranks fall on schedule, between sites, and survive a restart."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cola.autograd_learner import AutogradLearner
from cola.baselines.adalora import RankBudget, orthogonality_penalty
from cola.baselines.methods import PeftMethod, build_peft_method
from cola.checkpoint import load_state, save_state
from cola.config.choices import MethodName
from cola.config.schema import ExperimentConfig, MethodConfig
from cola.errors import SiteError
from cola.interfaces import Adaptation
from cola.learners import build_learner
from cola.models import BaseModel, build_base_model
from cola.task_data import Batch
from cola.tasks import resolve_problem
from tests.runs import config_of

INIT, TARGET, NUM_SITES = 6, 2, 4
HORIZON = 10


@functools.cache
def composed() -> ExperimentConfig:
    return config_of("task=synthetic", "model=tiny-roberta", "model.dtype=float64")


def configured(**settings: Any) -> ExperimentConfig:
    method = MethodConfig(
        name=MethodName.adalora,
        sites=["query", "value"],
        init_rank=INIT,
        target_rank=TARGET,
        delta_t=2,
    )
    return dataclasses.replace(composed(), method=dataclasses.replace(method, **settings))


def build(config: ExperimentConfig) -> tuple[BaseModel, Any]:
    problem = resolve_problem(config.task, config.model.family)
    return build_base_model(config.model, problem, seed=0), problem.objective


def build_method(config: ExperimentConfig) -> PeftMethod:
    return build_peft_method(config, *build(config), adaptations=HORIZON)


def learner_of(config: ExperimentConfig, adaptations: int = HORIZON) -> AutogradLearner:
    learner = build_learner(config, *build(config), adaptations=adaptations)
    assert isinstance(learner, AutogradLearner)
    return learner


def batch_of(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(4, 40, (4, 6), generator=generator)
    labels = torch.randint(0, 2, (4,), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs=inputs, labels=labels, num_terms=4)


def adapt(learner: AutogradLearner, first: int, last: int) -> tuple[list[float], list[float]]:
    """Losses, and ranks in use, of adaptations first..last."""
    losses, ranks = [], []
    for number in range(first, last + 1):
        adaptation = Adaptation(number=number, learning_rate=0.05)
        losses.append(learner.record(batch_of(number), adaptation).item())
        learner.update(adaptation)
        ranks.append(learner.measure().extra["adalora/ranks"])
    return losses, ranks


class Whole(NamedTuple):
    """A run that was never stopped."""

    losses: list[float]
    ranks: list[float]
    state: dict[str, Any]


@functools.cache
def whole() -> Whole:
    learner = learner_of(configured())
    losses, ranks = adapt(learner, 1, HORIZON)
    return Whole(losses, ranks, learner.state_dict())


def kept() -> list[int]:
    """Singular values in use at the end of that run, by site."""
    parameters = whole().state["parameters"]
    return [int(value.count_nonzero()) for key, value in parameters.items() if ".lora_E." in key]


def test_ranks_fall_on_schedule_to_the_target():
    full, final = INIT * NUM_SITES, TARGET * NUM_SITES
    # All for a tenth of the run, few for the last three; cubic between, every second adaptation.
    first, second, third = (
        int((full - final) * (1 - (number - 1) / (7 - 1)) ** 3 + final) for number in (2, 4, 6)
    )
    assert whole().ranks == [full, first, first, second, second, third, *[final] * 4]
    assert full > first > second
    assert sum(kept()) == final


def test_ranks_move_between_sites():
    assert len(kept()) == NUM_SITES
    assert max(kept()) > TARGET > min(kept())


@pytest.mark.parametrize(
    ("horizon", "ratios"), [(1, (0.1, 0.3)), (2, (0.1, 0.3)), (2, (0.6, 0.3)), (3, (0.0, 0.9))]
)
def test_shortest_runs_reach_the_target(horizon, ratios):
    config = configured(init_ratio=ratios[0], final_ratio=ratios[1])
    _, ranks = adapt(learner_of(config, horizon), 1, horizon)
    assert ranks[-1] == TARGET * NUM_SITES


@pytest.mark.parametrize("stop", [1, 5, 8])  # at the full budget, between two masks, at the end
def test_restart_gives_the_same_bits(tmp_path, stop):
    before = learner_of(configured())
    adapt(before, 1, stop)
    save_state(tmp_path / "state", before.state_dict())
    after = learner_of(configured())
    after.load_state_dict(load_state(tmp_path / "state"))
    losses, ranks = adapt(after, stop + 1, HORIZON)
    assert (losses, ranks) == (whole().losses[stop:], whole().ranks[stop:])
    assert_same(after.state_dict(), whole().state)


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


def test_penalty_is_that_of_the_library():
    method = build_method(configured(orth_weight=0.7))
    batch = batch_of(1)
    given = {**batch.inputs, "labels": batch.labels}
    task_loss = method.model(**given).loss
    # What PEFT's own forward adds to a loss that the model computes.
    penalised = method.ranks._tuner(**given).loss
    vectors = {k: p for k, p in method.trainable.items() if ".lora_A." in k or ".lora_B." in k}
    penalty = 0.7 * orthogonality_penalty(vectors)
    assert (penalised - task_loss).item() == pytest.approx(penalty.item(), rel=1e-9)


def test_penalty_is_optimised_but_not_logged():
    runs = {}
    for weight in (0.0, 5.0):
        learner = learner_of(configured(orth_weight=weight))
        losses, _ = adapt(learner, 1, 6)
        parameters = learner.state_dict()["parameters"]
        vectors = {k: p for k, p in parameters.items() if ".lora_A." in k or ".lora_B." in k}
        runs[weight] = losses[0], orthogonality_penalty(vectors).item()
    assert runs[0.0][0] == runs[5.0][0]
    assert runs[5.0][1] < 0.5 * runs[0.0][1]


def test_penalty_counts_once_in_an_interval(monkeypatch):
    calls = []
    monkeypatch.setattr(RankBudget, "penalise", lambda self: calls.append(self))
    learner = learner_of(configured())
    adaptation = Adaptation(number=1, learning_rate=0.05)
    learner.record(batch_of(1), None)
    learner.record(batch_of(2), adaptation)
    learner.update(adaptation)
    assert len(calls) == 1


def test_site_that_never_ran_is_named():
    ranks = build_method(configured()).ranks
    with pytest.raises(SiteError, match=r"^site roberta.*query never ran: leave it out of method"):
        ranks.reallocate(1)


def test_ranks_of_the_head_are_merged_into_it_when_saved(tmp_path: Path):
    from peft import PeftModel

    config = configured(sites=["query", "classifier.dense"])
    learner = learner_of(config)
    adapt(learner, 1, HORIZON)
    learner.save(tmp_path)
    base, _ = build(config)
    loaded = PeftModel.from_pretrained(base.module, tmp_path).eval()
    inputs = batch_of(1).inputs
    with learner.evaluating() as model, torch.no_grad():
        found, wanted = loaded(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
