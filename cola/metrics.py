"""Task metrics as local `evaluate.Metric` classes: no hub script, so they work offline.

Importing `evaluate` takes seconds, so import this module late. Predictions are kept in memory:
several processes can score at once, and nothing is left on disk.
"""

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from numpy.typing import NDArray
from torch import Tensor

from cola.config.choices import Objective
from cola.errors import ConfigError
from cola.interfaces import Score

Values = NDArray[Any]


class Accuracy(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """Share of equal classes, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Share of predictions that equal their reference, in [0, 1].", "int64")

    def _compute(self, predictions: Values, references: Values) -> dict[str, float]:
        return {"accuracy": float(np.mean(predictions == references))}


class TokenAccuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of scored tokens that a causal model predicts, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Share of label tokens predicted by the token before, in [0, 1].", "int64")

    def _compute(self, predictions: Values, references: Values) -> dict[str, float]:
        return {"token_accuracy": float(np.mean(predictions == references))}


class MatthewsCorrelation(evaluate.Metric):  # type: ignore[misc]
    """Matthews correlation of classes, in [-1, 1] (CoLA)."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Matthews correlation, in [-1, 1]; 0 if either side is constant.", "int64")

    def _compute(self, predictions: Values, references: Values) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        if _is_constant(predictions) or _is_constant(references):
            return {"matthews_correlation": 0.0}  # as scikit-learn says, less its warning
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class PearsonCorrelation(evaluate.Metric):  # type: ignore[misc]
    """Pearson correlation of values, and Spearman's of their ranks (STS-B)."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Correlations in [-1, 1]; 0 if either side is constant.", "float64")

    def _compute(self, predictions: Values, references: Values) -> dict[str, float]:
        from scipy.stats import rankdata

        return {
            "pearson": _pearson(predictions, references),
            "spearman": _pearson(rankdata(predictions), rankdata(references)),
        }


_METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "token_accuracy": TokenAccuracy,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": PearsonCorrelation,
}


@dataclass(frozen=True, kw_only=True)
class MetricScore:
    """A `Score` over one metric, whose own order of keys puts the judged one first."""

    metric: evaluate.Metric

    def __call__(self, *, predictions: Tensor, references: Tensor) -> dict[str, float]:
        """Score predictions against references, both (N,) on the CPU."""
        # float64 represents every class, token id and lower-precision value exactly.
        answer: dict[str, float] = self.metric.compute(
            predictions=predictions.double().numpy(), references=references.double().numpy()
        )
        return answer


def build_score(name: str, objective: Objective) -> Score:
    """The score of a task.

    Args:
        name: from `cola.tasks.metric_name`.
        objective: causal models are judged by the accuracy of the next token.

    Raises:
        ConfigError: no such metric.
    """
    if objective is Objective.causal and name == "accuracy":
        name = "token_accuracy"
    if name not in _METRICS:
        raise ConfigError(f"no metric {name}; choose one of {', '.join(_METRICS)}")
    # The constructor makes a cache folder even if data is kept in memory: give it a passing one.
    with TemporaryDirectory() as folder:
        return MetricScore(metric=_METRICS[name](keep_in_memory=True, cache_dir=folder))


def _describe(description: str, dtype: str) -> evaluate.MetricInfo:
    """Metadata that `evaluate` asks of every metric."""
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions and references, both (N,)",
        features=Features({"predictions": Value(dtype), "references": Value(dtype)}),
        format="numpy",
    )


def _is_constant(values: Values) -> bool:
    return bool(values.min() == values.max())


def _pearson(left: Values, right: Values) -> float:
    """Correlation in [-1, 1]; 0.0 where it is undefined because one side is constant."""
    if _is_constant(left) or _is_constant(right):
        return 0.0
    left = left - left.mean()
    right = right - right.mean()
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
