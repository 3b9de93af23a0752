"""Label metrics are those of scikit-learn and scipy, and have intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.metrics.catalogue import metrics_for_classes
from pipeline.metrics.intervals import measure, paired_differences

NAMES = ("accuracy", "f1", "f1_macro", "matthews")
CORRELATIONS = ("pearson", "spearman")


def test_all_values_are_those_of_scikit_learn_and_scipy() -> None:
    pytest.importorskip("sklearn")
    seen = set()
    for name, ours, theirs in compared():
        assert ours == pytest.approx(theirs, abs=1e-9), name
        seen.add(name)
    assert seen == {*NAMES, *CORRELATIONS}


def test_what_is_undefined_is_zero() -> None:
    constant = class_results([0, 0, 0], [0, 0, 0], 2)
    found = measure(constant, ["f1", "matthews"])
    assert found["f1"].estimate == found["matthews"].estimate == 0
    values = [{"sample": n, "label": float(n), "prediction": 3.1, "logits": [3.1]} for n in range(5)]
    assert measure(values, ["pearson", "spearman"])["pearson"].estimate == 0


def test_intervals_narrow_with_the_sample_and_differences_are_paired() -> None:
    generator = np.random.default_rng(1)
    widths = []
    for count in (100, 1600):
        labels = generator.integers(0, 2, count)
        better, worse = (np.where(generator.random(count) < right, labels, 1 - labels) for right in (0.9, 0.6))
        ours, theirs = (class_results(labels, predictions, 2) for predictions in (better, worse))
        interval = measure(ours, ["matthews"])["matthews"]
        assert interval.low < interval.estimate < interval.high
        widths.append(interval.high - interval.low)
        difference = paired_differences(ours, theirs, ["matthews", "f1"])
        assert difference["matthews"].estimate == pytest.approx(
            interval.estimate - measure(theirs, ["matthews"])["matthews"].estimate
        )
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.4)
    assert difference["f1"].low > 0


def test_f1_of_one_class_needs_two() -> None:
    assert metrics_for_classes(("accuracy", "f1", "f1_macro"), 3) == ("accuracy", "f1_macro")
    assert metrics_for_classes(("accuracy", "f1", "f1_macro"), 2) == ("accuracy", "f1", "f1_macro")


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
