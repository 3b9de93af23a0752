"""The promotion table."""

import pytest

from pipeline.promotion import decide
from pipeline.report.facts import Difference

BETTER, WORSE, UNCLEAR = Difference(2.0, 1.0, 3.0), Difference(-2.0, -3.0, -1.0), Difference(0.5, -1.0, 2.0)


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
        ("accuracy", {"base": Difference(1.0, 0.0, 2.0)}, None, False, "no clear gain"),
        ("accuracy", {"base": Difference(0.0, 0.0, 0.0)}, None, False, "no clear gain"),
        ("loss", {"base": WORSE}, None, True, "better: loss -2.0000 [-3.0000, -1.0000]"),
        ("loss", {"base": BETTER}, None, False, "worse"),
        ("loss", {"base": UNCLEAR}, None, False, "no clear gain"),
        ("accuracy", {"base": BETTER}, "the champion cannot be compared", False, "the champion cannot be compared"),
    ],
)  # fmt: skip
def test_only_what_is_clearly_better_than_all_is_promoted(metric, against, obstacle, promoted, says) -> None:
    decision = decide(metric, against, obstacle)
    assert decision.promote is promoted
    assert says in decision.reason


def test_the_reason_against_names_the_lost_comparisons_alone() -> None:
    reason = decide("accuracy", {"base": BETTER, "champion": WORSE}).reason
    assert "against the champion" in reason
    assert "against the base" not in reason
