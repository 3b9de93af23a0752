"""The promotion table."""

import pytest

from pipeline.metrics.intervals import Interval
from pipeline.run.promotion import Gate, decide, too_few

BETTER, WORSE, UNCLEAR = Interval(2.0, 1.0, 3.0), Interval(-2.0, -3.0, -1.0), Interval(0.5, -1.0, 2.0)


@pytest.mark.parametrize(
    ("metric", "against", "obstacle", "promoted", "says"),
    [
        ("accuracy", {"base": BETTER}, None, True, "better: accuracy +2.0000 [+1.0000, +3.0000] against the base"),
        ("accuracy", {"base": BETTER, "champion": BETTER}, None, True, "against the champion"),
        ("accuracy", {"base": BETTER, "champion": UNCLEAR}, None, False, "no clear gain"),
        ("accuracy", {"base": BETTER, "champion": WORSE}, None, False, "worse"),
        ("accuracy", {"base": WORSE, "champion": BETTER}, None, False, "against the base"),
        ("accuracy", {"base": WORSE}, None, False, "worse"),
        ("accuracy", {"base": UNCLEAR}, None, False, "the 95% interval holds 0"),
        ("accuracy", {"base": Interval(1.0, 0.0, 2.0)}, None, False, "no clear gain"),
        ("accuracy", {"base": Interval(0.0, 0.0, 0.0)}, None, False, "no clear gain"),
        ("loss", {"base": WORSE}, None, True, "better: loss -2.0000 [-3.0000, -1.0000]"),
        ("loss", {"base": BETTER}, None, False, "worse"),
        ("loss", {"base": UNCLEAR}, None, False, "no clear gain"),
        ("accuracy", {"base": BETTER}, "the champion cannot be compared", False, "the champion cannot be compared"),
    ],
)  # fmt: skip
def test_only_what_is_clearly_better_than_all_is_promoted(metric, against, obstacle, promoted, says) -> None:
    decision = decide(Gate(metric), {opponent: {metric: one} for opponent, one in against.items()}, obstacle)
    assert decision.promote is promoted
    assert says in decision.reason


@pytest.mark.parametrize(("samples", "verdict"), [(1, False), (5, False), (6, True), (400, True)])
def test_a_verdict_needs_some_samples(samples, verdict) -> None:
    decision = decide(Gate("accuracy"), {"base": {"accuracy": BETTER}}, too_few(samples))
    assert decision.promote is verdict
    assert ("at least 6 are needed" in decision.reason) is not verdict


@pytest.mark.parametrize(
    ("metric", "difference", "margin", "promoted", "says"),
    [
        ("accuracy", BETTER, 0.5, True, "better, by more than 0.5: accuracy +2.0000"),
        ("accuracy", BETTER, 1.0, False, "too small a gain: accuracy +2.0000 [+1.0000, +3.0000] against the base; "),
        ("accuracy", BETTER, 1.0, False, "the whole interval must show more than 1"),
        ("accuracy", BETTER, 5.0, False, "too small a gain"),
        ("accuracy", UNCLEAR, 0.1, False, "no clear gain"),
        ("accuracy", WORSE, 0.1, False, "worse"),
        ("loss", WORSE, 0.5, True, "better, by more than 0.5: loss -2.0000"),
        ("loss", WORSE, 1.5, False, "too small a gain: loss -2.0000"),
    ],
)
def test_the_margin_holds_for_the_whole_interval(metric, difference, margin, promoted, says) -> None:
    decision = decide(Gate(metric, margin), {"base": {metric: difference}})
    assert decision.promote is promoted
    assert says in decision.reason


@pytest.mark.parametrize(
    ("guard", "difference", "fall", "promoted", "says"),
    [
        ("chrf", Interval(0.0, -1.0, 1.0), 1.0, True, "guard kept: chrf +0.0000"),
        ("chrf", Interval(0.0, -1.0, 1.0), 0.9, False, "guard not certain: chrf +0.0000 [-1.0000, +1.0000]"),
        ("chrf", Interval(-2.0, -3.0, -1.0), 0.9, False, "guard broken: chrf -2.0000"),
        ("chrf", Interval(-2.0, -3.0, -1.0), 0.9, False, "must show a fall of 0.9 at most"),
        ("chrf", Interval(-2.0, -3.0, -1.0), 3.0, True, "guard kept"),
        ("chrf", Interval(2.0, 1.0, 3.0), 0.0, True, "guard kept"),
        ("loss", Interval(0.0, -1.0, 1.0), 1.0, True, "guard kept: loss"),
        ("loss", Interval(0.5, 0.2, 0.8), 0.5, False, "guard not certain: loss +0.5000"),
        (
            "loss",
            Interval(0.5, 0.2, 0.8),
            0.1,
            False,
            "guard broken: loss +0.5000 [+0.2000, +0.8000] against the base",
        ),
        ("loss", Interval(0.5, 0.2, 0.8), 0.1, False, "must show a rise of 0.1 at most"),
        ("loss", Interval(-0.5, -0.8, -0.2), 0.0, True, "guard kept"),
    ],
)
def test_a_guard_must_not_fall_by_more_than_allowed(guard, difference, fall, promoted, says) -> None:
    gate = Gate("rouge_l", guards={guard: fall})
    decision = decide(gate, {"base": {"rouge_l": BETTER, guard: difference}})
    assert decision.promote is promoted
    assert says in decision.reason


def test_a_guard_counts_against_every_opponent() -> None:
    gate = Gate("rouge_l", guards={"loss": 0.1})
    fine, risen = Interval(0.0, -0.05, 0.05), Interval(0.3, 0.2, 0.4)
    decision = decide(gate, {"base": {"rouge_l": BETTER, "loss": risen}, "champion": {"rouge_l": BETTER, "loss": fine}})
    assert not decision.promote
    assert decision.reason.startswith("guard broken: loss +0.3000 [+0.2000, +0.4000] against the base")
    assert "champion" not in decision.reason


def test_the_reason_against_names_the_lost_comparisons_alone() -> None:
    gate = Gate("accuracy")
    reason = decide(gate, {"base": {"accuracy": BETTER}, "champion": {"accuracy": WORSE}}).reason
    assert "against the champion" in reason
    assert "against the base" not in reason
