"""What a submission means, given the jobs there are."""

import pytest

from pipeline.apps.job_client import FAILED, PENDING, RUNNING, STOPPED, SUCCEEDED, Next, first_id, next_step

FIRST = "kasa-tiny-0123456789ab"
SECOND, THIRD = f"{FIRST}-2", f"{FIRST}-3"


@pytest.mark.parametrize(
    ("statuses", "again", "expected"),
    [
        ({}, False, Next("submit", FIRST, 1)),
        ({"kasa-tiny-another": SUCCEEDED}, False, Next("submit", FIRST, 1)),
        ({FIRST: PENDING}, False, Next("follow", FIRST, 1)),
        ({FIRST: RUNNING}, True, Next("follow", FIRST, 1)),
        ({FIRST: SUCCEEDED}, False, Next("done", FIRST, 1)),
        ({FIRST: SUCCEEDED}, True, Next("submit", SECOND, 2, SUCCEEDED)),
        ({FIRST: FAILED}, False, Next("submit", SECOND, 2, FAILED)),
        ({FIRST: STOPPED}, False, Next("submit", SECOND, 2, STOPPED)),
        ({FIRST: FAILED, SECOND: RUNNING}, False, Next("follow", SECOND, 2)),
        ({FIRST: FAILED, SECOND: FAILED}, False, Next("submit", THIRD, 3, FAILED)),
        ({FIRST: STOPPED, SECOND: SUCCEEDED}, False, Next("done", SECOND, 2)),
    ],
)
def test_the_newest_attempt_decides(statuses: dict[str, str], again: bool, expected: Next) -> None:
    assert next_step(FIRST, statuses, again) == expected


def test_the_id_changes_with_everything_that_decides_what_the_job_does() -> None:
    recipe, package, places = {"name": "tiny", "train": {"seed": 0}}, "aa", {"MLFLOW_TRACKING_URI": "http://a"}
    same = first_id("tiny", {"train": {"seed": 0}, "name": "tiny"}, package, places)
    assert same == first_id("tiny", recipe, package, places)
    others = {
        first_id("tiny", recipe | {"train": {"seed": 1}}, package, places),
        first_id("tiny", recipe, "bb", places),
        first_id("tiny", recipe, package, {}),
    }
    assert len(others | {same}) == 4
