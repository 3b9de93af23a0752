"""Metrics against their libraries and by hand; intervals that cover 0 where nothing differs."""

import math

import numpy as np
import pytest
import scipy.stats
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_chrf

from pipeline.metrics import intervals
from pipeline.metrics.intervals import LEAST_SAMPLES, Interval, measure

PAIRS = [
    ("the cat sat on the mat", "a cat was sitting on the mat"),
    ("running dogs", "the dogs run"),
    ("", "something"),
    ("exactly this", "exactly this"),
]


def texts(pairs: list[tuple[str, str]]) -> list[dict]:
    return [{"sample": n, "output": output, "references": [reference]} for n, (output, reference) in enumerate(pairs)]


def value(results: list[dict], metric: str) -> float:
    return measure(results, [metric])[metric].estimate


def test_text_metrics_are_the_libraries() -> None:
    outputs, references = zip(*PAIRS, strict=True)
    rouge = [
        RougeScorer(["rougeL"], use_stemmer=True).score(reference, output)["rougeL"].fmeasure
        for output, reference in PAIRS
    ]
    assert value(texts(PAIRS), "rouge_l") == pytest.approx(100 * sum(rouge) / len(rouge))
    assert value(texts(PAIRS), "chrf") == corpus_chrf(outputs, [references]).score


def test_rouge_by_hand() -> None:
    # Longest common subsequence "cat on the mat" of 6 and 7 words: P 4/6, R 4/7.
    assert value(texts(PAIRS[:1]), "rouge_l") == pytest.approx(100 * 2 * (4 / 6) * (4 / 7) / (4 / 6 + 4 / 7))
    assert value(texts(PAIRS[3:]), "rouge_l") == value(texts(PAIRS[3:]), "chrf") == pytest.approx(100)


def test_the_best_of_several_references_counts() -> None:
    several = [{"sample": 0, "output": "the cat sat", "references": ["no dogs here", "the cat sat"]}]
    several.append({"sample": 1, "output": "one", "references": ["one"]})
    assert value(several, "rouge_l") == value(several, "chrf") == pytest.approx(100)


def test_loss_is_per_token() -> None:
    found = measure([losses(0, 6.0, 3), losses(1, 1.0, 7)], ["loss", "perplexity"])
    assert found["loss"].estimate == pytest.approx(0.7)  # not the mean of per-sample means
    assert found["perplexity"].estimate == pytest.approx(math.exp(0.7))


def losses(sample: int, loss_sum: float, tokens: int) -> dict:
    return {"sample": sample, "loss_sum": loss_sum, "tokens": tokens}


def test_answers() -> None:
    assert value([{"sample": n, "accuracy": float(n < 3)} for n in range(4)], "accuracy") == 0.75


def test_perplexity_of_a_diverged_model_is_still_a_number() -> None:
    assert math.isfinite(value([losses(0, 1e6, 1)], "perplexity"))


def test_the_interval_is_that_of_the_binomial() -> None:
    found = measure([{"sample": n, "accuracy": float(n < 300)} for n in range(400)], ["accuracy"])["accuracy"]
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (found.low, found.high) == pytest.approx((0.75 - spread, 0.75 + spread), abs=0.004)


def results(seed: int, gain: float = 0.0, count: int = 200) -> list[dict]:
    generator = np.random.default_rng(seed)
    correct = generator.random(count) < 0.5 + gain
    losses = generator.gamma(4, 1, count) * (1 - gain)
    return [
        {"sample": i, "loss_sum": float(loss), "tokens": 2 + i % 5, "accuracy": float(right)}
        for i, (loss, right) in enumerate(zip(losses, correct, strict=True))
    ]


def paired_differences(ours: list[dict], theirs: list[dict]) -> dict[str, Interval]:
    return intervals.paired_differences(ours, theirs, ["accuracy", "loss"])


def test_a_model_against_itself_differs_by_nothing() -> None:
    for difference in paired_differences(results(0), results(0)).values():
        assert (difference.estimate, difference.low, difference.high) == (0, 0, 0)


def test_equal_models_are_not_told_apart_more_often_than_one_in_twenty() -> None:
    told_apart = sum(
        not (found.low <= 0 <= found.high)
        for seed in range(40)
        for found in [paired_differences(results(2 * seed, count=80), results(2 * seed + 1, count=80))["accuracy"]]
    )
    assert told_apart <= 6


def test_a_clear_gain_is_seen_with_its_sign() -> None:
    found = paired_differences(results(1, gain=0.3), results(2))
    assert 0 < found["accuracy"].low < found["accuracy"].estimate < found["accuracy"].high
    assert found["loss"].low < found["loss"].estimate < found["loss"].high < 0


def test_the_estimate_is_the_difference_of_the_aggregates() -> None:
    ours, theirs = results(3), results(4)
    found = paired_differences(ours, theirs)
    for metric in ("accuracy", "loss"):
        assert found[metric].estimate == pytest.approx(value(ours, metric) - value(theirs, metric))
    assert paired_differences(ours, theirs) == found


def test_a_paired_gain_is_seen_where_the_spread_of_samples_would_hide_it() -> None:
    theirs = results(5)
    ours = [result | {"loss_sum": result["loss_sum"] - 0.01} for result in theirs]
    assert paired_differences(ours, theirs)["loss"].high < 0


def test_a_gain_in_proportion_to_the_tokens_is_certain() -> None:
    # Whatever is drawn, the loss per token falls by the same amount, if differences and tokens are drawn together.
    theirs = results(6)
    ours = [result | {"loss_sum": result["loss_sum"] - 0.25 * result["tokens"]} for result in theirs]
    found = paired_differences(ours, theirs)["loss"]
    assert (found.estimate, found.low) == pytest.approx((-0.25, -0.25), abs=1e-12)
    # Nothing is certain of the samples that were not drawn.
    assert found.high == pytest.approx(-0.25 * (2 * 0.025 ** (1 / 200) - 1))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 10, 100])
def test_what_agrees_is_as_certain_as_its_number_allows(count) -> None:
    """The interval is Clopper and Pearson's, and stands clear of no difference where the sign test does."""
    ours, theirs = ([{"sample": n, "accuracy": right} for n in range(count)] for right in (1.0, 0.0))
    found = intervals.paired_differences(ours, theirs, ["accuracy"])["accuracy"]
    assert (found.low > 0) == (scipy.stats.binomtest(count, count).pvalue < 0.05) == (count >= LEAST_SAMPLES)
    assert found.low < found.estimate == found.high == 1
    other_way = intervals.paired_differences(theirs, ours, ["accuracy"])["accuracy"]
    assert (other_way.low, other_way.high) == pytest.approx((-found.high, -found.low))
    exact = scipy.stats.binomtest(count, count).proportion_ci()
    for results, expected in ((ours, (1, exact.low, 1)), (theirs, (0, 0, 1 - exact.low))):
        one = measure(results, ["accuracy"])["accuracy"]
        assert (one.estimate, one.low, one.high) == pytest.approx(expected)
    seeds = intervals.difference_over_seeds([ours], [theirs], "accuracy")
    assert (seeds.p_value < 0.05) == (seeds.interval.low > 0) == (count >= LEAST_SAMPLES)
    by_name = ({str(one["sample"]): one["accuracy"] for one in results} for results in (ours, theirs))
    assert intervals.mean_differences(*by_name) == found


def test_samples_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="same samples"):
        paired_differences(results(0), results(0)[:-1])
