"""Intervals over samples and seeds: do they cover what they claim to, and is the correction Holm's?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.metrics.intervals import difference_over_seeds, holm, mean_over_seeds


def run(scores: Any) -> list[dict[str, Any]]:
    return [{"sample": index, "exact_match": float(score)} for index, score in enumerate(scores)]


def test_the_estimate_is_the_mean_over_seeds() -> None:
    found = mean_over_seeds([run([1, 1, 0, 0]), run([1, 1, 1, 0])], "exact_match")
    assert found.estimate == pytest.approx((0.5 + 0.75) / 2)
    assert found.low < found.estimate < found.high


def test_equal_seeds_add_nothing_to_the_spread_of_the_samples() -> None:
    scores = np.random.default_rng(0).integers(0, 2, 200)
    one, three = (mean_over_seeds([run(scores)] * count, "exact_match") for count in (1, 3))
    assert (one.low, one.high) == (three.low, three.high)


def test_seeds_that_differ_widen_the_interval_as_a_t_interval_does() -> None:
    # All samples of a run score alike: nothing is left to chance but the seed.
    found = mean_over_seeds([run([score] * 50) for score in (0.2, 0.4, 0.6)], "exact_match")
    half = 4.303 * 0.2 / np.sqrt(3)  # t of 2 degrees of freedom at 97.5%
    assert found.high - 0.4 == pytest.approx(half, rel=0.2)
    assert 0.4 - found.low == pytest.approx(half, rel=0.2)


def test_a_difference_is_paired_by_sample_and_by_seed() -> None:
    generator = np.random.default_rng(1)
    hard = generator.random(300)
    theirs = [hard + generator.normal(0, 0.01, 300) + shift for shift in (0.0, 0.3, 0.6)]
    ours = [scores + 0.1 + generator.normal(0, 0.01, 300) for scores in theirs]
    found = difference_over_seeds([run(scores) for scores in ours], [run(scores) for scores in theirs], "exact_match")
    assert found.interval.estimate == pytest.approx(0.1, abs=0.005)
    # Neither the samples' spread (0.29) nor the seeds' (0.3) is left in it.
    assert found.interval.high - found.interval.low < 0.02
    assert found.p_value < 0.01
    assert len(found.by_seed) == 3


def test_no_difference_is_rarely_called_one() -> None:
    """With three seeds and an effect of chance alone, the 95% interval misses zero in about one case of twenty."""
    generator = np.random.default_rng(2)
    missed = 0
    for repeat in range(200):
        ours, theirs = (
            [run(generator.normal(generator.normal(0, 0.1), 1, 60)) for _ in range(3)] for _ in ("ours", "theirs")
        )
        interval = difference_over_seeds(ours, theirs, "exact_match", seed=repeat).interval
        missed += not interval.low <= 0 <= interval.high
    assert missed <= 16


def test_a_base_stands_for_every_seed() -> None:
    found = difference_over_seeds([run([1, 1]), run([1, 0])], [run([0, 0])], "exact_match")
    assert found.by_seed == (1.0, 0.5)


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples"):
        mean_over_seeds([run([1, 0]), run([1, 0])[::-1]], "exact_match")
    with pytest.raises(ValueError, match="2 runs cannot be paired with 3"):
        difference_over_seeds([run([1])] * 2, [run([1])] * 3, "exact_match")


def test_holm_by_hand() -> None:
    # 3 x 0.01, then 2 x 0.03, then 0.04 raised to what stands before it.
    adjusted = holm({"a": 0.03, "b": 0.01, "c": 0.04})
    assert adjusted == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert list(adjusted) == ["a", "b", "c"]
    assert holm({}) == {}
