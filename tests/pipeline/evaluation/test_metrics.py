"""Metrics against their libraries and by hand; intervals that cover 0 where nothing differs."""

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_chrf, sentence_chrf

from pipeline.evaluation.metrics import aggregate, paired_differences, text_scores

PAIRS = [
    ("the cat sat on the mat", "a cat was sitting on the mat"),
    ("running dogs", "the dogs run"),
    ("", "something"),
    ("exactly this", "exactly this"),
]


@pytest.mark.parametrize(("output", "reference"), PAIRS)
def test_text_scores_are_the_libraries(output, reference) -> None:
    scores = text_scores(output, reference)
    rouge = RougeScorer(["rougeL"], use_stemmer=True).score(reference, output)["rougeL"].fmeasure
    assert scores == {"rouge_l": 100 * rouge, "chrf": sentence_chrf(output, [reference]).score}


def test_rouge_by_hand() -> None:
    # Longest common subsequence "cat on the mat" of 6 and 7 words: P 4/6, R 4/7.
    assert text_scores(*PAIRS[0])["rouge_l"] == pytest.approx(100 * 2 * (4 / 6) * (4 / 7) / (4 / 6 + 4 / 7))
    assert text_scores(*PAIRS[3]) == pytest.approx({"rouge_l": 100, "chrf": 100})


def test_aggregate() -> None:
    results = [{"loss_sum": 6.0, "tokens": 3, "output": o, "reference": r, **text_scores(o, r)} for o, r in PAIRS[:2]]
    results[1] |= {"loss_sum": 1.0, "tokens": 7}
    found = aggregate(results)
    assert found["loss"] == pytest.approx(0.7)  # per token, not the mean of per-sample means
    assert found["perplexity"] == pytest.approx(math.exp(0.7))
    assert found["rouge_l"] == pytest.approx((results[0]["rouge_l"] + results[1]["rouge_l"]) / 2)
    assert found["chrf"] == corpus_chrf([o for o, _ in PAIRS[:2]], [[r for _, r in PAIRS[:2]]]).score
    assert set(found) == {"loss", "perplexity", "rouge_l", "chrf"}


def test_answers() -> None:
    found = aggregate([{"loss_sum": 1.0, "tokens": 1, "accuracy": float(n < 3)} for n in range(4)])
    assert found["accuracy"] == 0.75


def test_perplexity_of_a_diverged_model_is_still_a_number() -> None:
    assert math.isfinite(aggregate([{"loss_sum": 1e6, "tokens": 1}])["perplexity"])


def results(seed: int, gain: float = 0.0, count: int = 200) -> list[dict]:
    generator = np.random.default_rng(seed)
    correct = generator.random(count) < 0.5 + gain
    losses = generator.gamma(4, 1, count) * (1 - gain)
    return [
        {"loss_sum": float(loss), "tokens": 2 + i % 5, "accuracy": float(right)}
        for i, (loss, right) in enumerate(zip(losses, correct, strict=True))
    ]


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
    assert set(found) == {"accuracy", "loss"}


def test_the_estimate_is_the_difference_of_the_aggregates() -> None:
    ours, theirs = results(3), results(4)
    found = paired_differences(ours, theirs)
    for metric in ("accuracy", "loss"):
        assert found[metric].estimate == pytest.approx(aggregate(ours)[metric] - aggregate(theirs)[metric])
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
    assert (found.estimate, found.low, found.high) == pytest.approx((-0.25, -0.25, -0.25), abs=1e-12)


def test_samples_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_differences(results(0), results(0)[:-1])
