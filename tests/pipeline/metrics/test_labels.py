"""Label metrics are those of scikit-learn and scipy, and have intervals."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.metrics.catalogue import metrics_for_classes
from pipeline.metrics.intervals import measure, paired_differences
from tests.support.label_metrics import CORRELATIONS, NAMES, class_results, compared


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
