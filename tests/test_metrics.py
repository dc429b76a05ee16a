"""Metrics equal scikit-learn's and SciPy's, need no network and leave nothing behind."""

import warnings
from pathlib import Path

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from torch import Tensor

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
    score = build_score("accuracy")
    expected = accuracy_score(references, predictions)
    assert score(predictions=predictions, references=references) == {"accuracy": expected}


def test_matthews_equals_sklearn(classes: tuple[Tensor, Tensor]) -> None:
    predictions, references = classes
    score = build_score("matthews_correlation")
    answer = score(predictions=predictions, references=references)
    expected = matthews_corrcoef(references, predictions)
    assert answer == {"matthews_correlation": pytest.approx(expected)}


def test_correlations_equal_scipy_pearson_first(values: tuple[Tensor, Tensor]) -> None:
    predictions, references = values
    score = build_score("pearson")
    answer = score(predictions=predictions, references=references)
    assert list(answer) == ["pearson", "spearman"]
    assert answer["pearson"] == pytest.approx(pearsonr(predictions, references)[0], rel=1e-6)
    assert answer["spearman"] == pytest.approx(spearmanr(predictions, references)[0])


@pytest.mark.parametrize("name", ["pearson", "matthews_correlation"])
@pytest.mark.parametrize("constant_references", [False, True])
def test_constant_prediction_scores_zero_without_warning(
    name: str, constant_references: bool
) -> None:
    score = build_score(name)
    references = torch.ones(4) if constant_references else torch.tensor([0.0, 1.0, 1.0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = score(predictions=torch.ones(4), references=references)
    assert set(answer.values()) == {0.0}


def test_score_accepts_bfloat16_and_repeats() -> None:
    score = build_score("pearson")
    predictions = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16)
    references = torch.tensor([1.0, 2.0, 4.0])
    answers = [score(predictions=predictions, references=references) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0]["pearson"] == pytest.approx(1.0)


def test_score_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    score = build_score("accuracy")
    score(predictions=torch.tensor([1, 0]), references=torch.tensor([1, 1]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "cat sat down here", 4 / 7),  # 2 of 3 and 2 of 4 words
        ("Cats, sat!", "cats sat", 1.0),  # neither case nor punctuation counts
        ("cat", "cats", 0.0),  # no stemmer
        ("sat cat", "cat sat", 0.5),  # the order counts
        ("", "cat", 0.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(
    prediction: str, reference: str, f1: float
) -> None:
    answer = build_score("rouge_l")(predictions=[prediction], references=[reference])
    assert answer == {"rougeL": pytest.approx(f1)}


def test_rouge_l_is_a_mean_over_texts() -> None:
    answer = build_score("rouge_l")(predictions=["a b", "c"], references=["a b", "d"])
    assert answer == {"rougeL": 0.5}


def test_exact_match_ignores_outer_blanks() -> None:
    score = build_score("exact_match")
    answer = score(predictions=["a b ", "A b", "c"], references=["a b", "a b", "c"])
    assert answer == {"exact_match": pytest.approx(2 / 3)}


def test_unknown_metric_lists_choices() -> None:
    with pytest.raises(ConfigError, match="no metric rogue; choose one of accuracy"):
        build_score("rogue")
