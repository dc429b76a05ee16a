"""Metrics equal scikit-learn's and SciPy's, need no network and leave nothing behind."""

import warnings
from pathlib import Path

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from torch import Tensor

from cola.config.choices import Objective
from cola.errors import ConfigError
from cola.metrics import build_score


@pytest.fixture(params=range(3))
def classes(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(request.param)
    predictions, references = torch.randint(0, 3, (2, 50), generator=generator)
    return predictions, references


@pytest.fixture(params=range(3))
def values(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(request.param)
    references = torch.randn(50, generator=generator)
    return references + torch.randn(50, generator=generator), references


def test_accuracy_equals_sklearn(classes: tuple[Tensor, Tensor]) -> None:
    predictions, references = classes
    score = build_score("accuracy", Objective.classification)
    expected = accuracy_score(references, predictions)
    assert score(predictions=predictions, references=references) == {"accuracy": expected}


def test_token_accuracy_judges_causal_models(classes: tuple[Tensor, Tensor]) -> None:
    predictions, references = classes
    score = build_score("accuracy", Objective.causal)
    expected = accuracy_score(references, predictions)
    assert score(predictions=predictions, references=references) == {"token_accuracy": expected}


def test_matthews_equals_sklearn(classes: tuple[Tensor, Tensor]) -> None:
    predictions, references = classes
    score = build_score("matthews_correlation", Objective.classification)
    answer = score(predictions=predictions, references=references)
    expected = matthews_corrcoef(references, predictions)
    assert answer == {"matthews_correlation": pytest.approx(expected)}


def test_correlations_equal_scipy_pearson_first(values: tuple[Tensor, Tensor]) -> None:
    predictions, references = values
    score = build_score("pearson", Objective.regression)
    answer = score(predictions=predictions, references=references)
    assert list(answer) == ["pearson", "spearman"]
    assert answer["pearson"] == pytest.approx(pearsonr(predictions, references)[0], rel=1e-6)
    assert answer["spearman"] == pytest.approx(spearmanr(predictions, references)[0])


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("pearson", Objective.regression),
        ("matthews_correlation", Objective.classification),
    ],
)
@pytest.mark.parametrize("constant_references", [False, True])
def test_constant_prediction_scores_zero_without_warning(
    name: str, objective: Objective, constant_references: bool
) -> None:
    score = build_score(name, objective)
    references = torch.ones(4) if constant_references else torch.tensor([0.0, 1.0, 1.0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = score(predictions=torch.ones(4), references=references)
    assert set(answer.values()) == {0.0}


def test_score_accepts_bfloat16_and_repeats() -> None:
    score = build_score("pearson", Objective.regression)
    predictions = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16)
    references = torch.tensor([1.0, 2.0, 4.0])
    answers = [score(predictions=predictions, references=references) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0]["pearson"] == pytest.approx(1.0)


def test_score_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    score = build_score("accuracy", Objective.classification)
    score(predictions=torch.tensor([1, 0]), references=torch.tensor([1, 1]))
    assert list(tmp_path.iterdir()) == []


def test_unknown_metric_lists_choices() -> None:
    with pytest.raises(ConfigError, match="no metric rogue; choose one of accuracy"):
        build_score("rogue", Objective.classification)
