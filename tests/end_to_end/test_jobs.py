"""Jobs on a real Ray head; what the check `ray-jobs` measures, scenario by scenario."""

from collections.abc import Callable, Iterator

import pytest

from tests.support.job_scenarios import SCENARIOS, Findings, Jobs, missing_data, twice_is_one_job
from tests.support.ray_head import ray_head
from tests.support.tiny_run import Bench

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("jobs")]


@pytest.fixture(scope="module")
def jobs(bench: Bench) -> Iterator[Jobs]:
    with ray_head(cpus=2) as head:
        yield Jobs(bench.folder, head)


def test_a_failing_job_fails_with_its_own_code(jobs: Jobs) -> None:
    missing_data(jobs, found := Findings())
    assert not found.failed


def test_a_job_succeeds_and_the_same_submission_again_is_the_same_job(jobs: Jobs) -> None:
    twice_is_one_job(jobs, found := Findings(), "train.max_steps=4", "train.workers=1")
    assert not found.failed


@pytest.mark.soak
@pytest.mark.parametrize("scenario", [one for one in SCENARIOS if one not in (missing_data, twice_is_one_job)])
def test_whatever_happens_to_a_job(jobs: Jobs, scenario: Callable[[Jobs, Findings], None]) -> None:
    scenario(jobs, found := Findings())
    assert not found.failed
