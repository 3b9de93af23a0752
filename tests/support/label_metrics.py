"""The label metrics against scikit-learn and scipy on the same predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.metrics.intervals import measure

NAMES = ("accuracy", "f1", "f1_macro", "matthews")
CORRELATIONS = ("pearson", "spearman")


def largest_difference() -> tuple[float, dict[str, float]]:
    """The largest absolute difference of any metric over all cases, and the largest of each."""
    worst: dict[str, float] = {}
    for name, ours, theirs in compared():
        worst[name] = max(worst.get(name, 0.0), abs(ours - theirs))
    return max(worst.values()), worst


def compared() -> Iterator[tuple[str, float, float]]:
    """Metric, our value, theirs; over balanced and skewed classes, classes that never occur, ties and large offsets."""
    generator = np.random.default_rng(0)
    for classes, shares in ((2, (0.5, 0.5)), (2, (0.97, 0.03)), (3, (0.2, 0.3, 0.5)), (5, (0.5, 0.5, 0, 0, 0))):
        for agreement in (0.0, 0.5, 0.9):
            labels = generator.choice(classes, 400, p=shares)
            guesses = generator.choice(classes, 400, p=shares)
            predictions = np.where(generator.random(400) < agreement, labels, guesses)
            yield from _classes(labels, predictions, classes)
    yield from _classes(np.array([0, 1] * 50), np.zeros(100, int), 2)
    for offset, digits in ((0.0, 6), (1e6, 6), (2.5, 0)):
        labels = np.round(offset + generator.normal(size=300), digits)
        for noise in (0.1, 3.0):
            yield from _values(labels, np.round(labels + noise * generator.normal(size=300), digits))


def class_results(labels: Any, predictions: Any, classes: int) -> list[dict[str, Any]]:
    """Results as an evaluation writes them."""
    return [
        {"sample": n, "label": int(t), "prediction": int(p), "accuracy": float(t == p), "logits": [0.0] * classes}
        for n, (t, p) in enumerate(zip(labels, predictions, strict=True))
    ]


def _classes(labels: Any, predictions: Any, classes: int) -> Iterator[tuple[str, float, float]]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    names = NAMES if classes == 2 else tuple(name for name in NAMES if name != "f1")
    ours = measure(class_results(labels, predictions, classes), names)
    theirs = {
        "accuracy": accuracy_score(labels, predictions),
        "f1": f1_score(labels, predictions, zero_division=0.0) if classes == 2 else None,
        "f1_macro": f1_score(labels, predictions, average="macro", zero_division=0.0),
        "matthews": matthews_corrcoef(labels, predictions),
    }
    for name in names:
        yield name, ours[name].estimate, float(theirs[name])


def _values(labels: Any, predictions: Any) -> Iterator[tuple[str, float, float]]:
    from scipy.stats import pearsonr, spearmanr

    results = [
        {"sample": n, "label": float(t), "prediction": float(p), "logits": [float(p)]}
        for n, (t, p) in enumerate(zip(labels, predictions, strict=True))
    ]
    ours = measure(results, CORRELATIONS)
    for name, function in (("pearson", pearsonr), ("spearman", spearmanr)):
        yield name, ours[name].estimate, float(function(predictions, labels).statistic)
