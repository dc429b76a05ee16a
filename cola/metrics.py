"""Task metrics as local `evaluate.Metric` classes: no hub script, so they work offline.

Importing `evaluate` takes seconds, so import this module late. Predictions are kept in memory:
several processes can score at once, and nothing is left on disk. What a model writes is judged by
ROUGE-L, the paper's "ROUGE (Longest)".
"""

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from numpy.typing import NDArray
from torch import Tensor

from cola.errors import ConfigError
from cola.task_data import Score, Values

Array = NDArray[Any]


class Accuracy(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """Share of equal classes, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Share of predictions that equal their reference, in [0, 1].", "int64")

    def _compute(self, predictions: Array, references: Array) -> dict[str, float]:
        return {"accuracy": float(np.mean(predictions == references))}


class MatthewsCorrelation(evaluate.Metric):  # type: ignore[misc]
    """Matthews correlation of classes, in [-1, 1] (CoLA)."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Matthews correlation, in [-1, 1]; 0 if either side is constant.", "int64")

    def _compute(self, predictions: Array, references: Array) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        if _is_constant(predictions) or _is_constant(references):
            return {"matthews_correlation": 0.0}  # as scikit-learn says, less its warning
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class PearsonCorrelation(evaluate.Metric):  # type: ignore[misc]
    """Pearson correlation of values, and Spearman's of their ranks (STS-B)."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Correlations in [-1, 1]; 0 if either side is constant.", "float64")

    def _compute(self, predictions: Array, references: Array) -> dict[str, float]:
        from scipy.stats import rankdata

        return {
            "pearson": _pearson(predictions, references),
            "spearman": _pearson(rankdata(predictions), rankdata(references)),
        }


class RougeL(evaluate.Metric):  # type: ignore[misc]
    """F1 of the longest common subsequence of words, no stemmer, mean over texts, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Mean F1 of the longest common subsequence of words.", "string")

    def _compute(self, predictions: Array, references: Array) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        score = RougeScorer(["rougeL"], use_stemmer=False).score
        pairs = zip(references, predictions, strict=True)
        values = [score(target, text)["rougeL"].fmeasure for target, text in pairs]
        return {"rougeL": float(np.mean(values))}


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """Share of texts that equal their reference, blanks around them aside, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Share of texts that equal their reference, in [0, 1].", "string")

    def _compute(self, predictions: Array, references: Array) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": float(np.mean([a.strip() == b.strip() for a, b in pairs]))}


_METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "exact_match": ExactMatch,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": PearsonCorrelation,
    "rouge_l": RougeL,
}


@dataclass(frozen=True, kw_only=True)
class MetricScore:
    """A `Score` over one metric, whose own order of keys puts the judged one first."""

    metric: evaluate.Metric

    def __call__(self, *, predictions: Values, references: Values) -> dict[str, float]:
        """Score predictions against references, N of each."""
        answer: dict[str, float] = self.metric.compute(
            predictions=_plain(predictions), references=_plain(references)
        )
        return answer


def build_score(name: str) -> Score:
    """The score of a task.

    Args:
        name: from `cola.tasks.metric_name`.

    Raises:
        ConfigError: no such metric.
    """
    if name not in _METRICS:
        raise ConfigError(f"no metric {name}; choose one of {', '.join(_METRICS)}")
    # The constructor makes a cache folder even if data is kept in memory: give it a passing one.
    with TemporaryDirectory() as folder:
        return MetricScore(metric=_METRICS[name](keep_in_memory=True, cache_dir=folder))


def _plain(values: Values) -> Array | list[str]:
    # float64 represents every class and lower-precision value exactly.
    if isinstance(values, Tensor):
        array: Array = values.double().numpy()
        return array
    return list(values)


def _describe(description: str, dtype: str) -> evaluate.MetricInfo:
    """Metadata that `evaluate` asks of every metric."""
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions and references, N of each",
        features=Features({"predictions": Value(dtype), "references": Value(dtype)}),
        format="numpy",
    )


def _is_constant(values: Array) -> bool:
    return bool(values.min() == values.max())


def _pearson(left: Array, right: Array) -> float:
    """Correlation in [-1, 1]; 0.0 where it is undefined because one side is constant."""
    if _is_constant(left) or _is_constant(right):
        return 0.0
    left = left - left.mean()
    right = right - right.mean()
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
