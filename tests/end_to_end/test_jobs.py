"""Jobs on a real Ray head: submitted by `kasa submit` and by Ray's own command, failing, killed, stopped and cut off."""

from __future__ import annotations

import os
import pty
import signal
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.support import ROOT
from tests.support.cut import door_to
from tests.support.processes import end_all
from tests.support.ray_head import Head, ray_head, ray_job_submit
from tests.support.submitted_jobs import Jobs, finish, hear
from tests.support.tiny_run import Bench, parents

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("jobs")]

MODULE = "ray_jobs.run_pipeline"


@pytest.fixture(scope="module")
def jobs(bench: Bench) -> Iterator[Jobs]:
    with ray_head(cpus=2) as head:
        yield Jobs(bench.folder, head)


def test_a_failing_job_fails_with_its_own_code(jobs: Jobs) -> None:
    # Whatever cluster RAY_ADDRESS names, the job goes where `--address` says.
    elsewhere = Head(jobs.head.address, jobs.head.environment | {"RAY_ADDRESS": "127.0.0.1:9"}, jobs.head.process)
    said = Jobs(jobs.folder, elsewhere).submit("missing", "data.train=/nowhere/rows.jsonl")
    assert said.code == 2, said
    assert "/nowhere/rows.jsonl does not exist" in said.log
    assert said.result["status"] == "FAILED"


def test_a_job_succeeds_and_the_same_submission_again_is_the_same_job(jobs: Jobs) -> None:
    overrides = ("train.max_steps=4", "train.workers=1")
    said = jobs.submit("twice", "--env", "MLFLOW_TRACKING_USERNAME=nobody", *overrides)
    assert said.code == 0, said
    assert all(f"{stage}:" in said.log for stage in ("prepare", "train"))
    assert list((jobs.folder / "twice" / "reports").glob("*.html"))
    before = jobs.statuses()
    again = jobs.submit("twice", *overrides)
    assert again.code == 0, again
    assert again.result["job"] == said.result["job"]
    assert "has succeeded already" in again.messages
    assert jobs.statuses() == before


@pytest.mark.soak
def test_two_submissions_at_once_follow_one_job_past_ctrl_c_and_a_cut_connection(jobs: Jobs) -> None:
    port = urlsplit(jobs.head.address).port
    assert port is not None
    with door_to(port) as door:
        first = jobs.start("at-once", address=f"http://127.0.0.1:{door.port}")
        second = jobs.start("at-once")
        jobs.wait(lambda: jobs.steps("at-once") >= 1, first)
        second.send_signal(signal.SIGINT)
        left = finish(second)
        door.shut()
        time.sleep(5)
        door.reopen()
        followed = finish(first)
    assert left.result["job"] == followed.result["job"]
    assert left.code == 130, left
    assert "the job goes on" in left.messages
    assert followed.code == 0, followed
    assert "connection to the dashboard is lost" in followed.messages
    lines = [line for line in followed.log.splitlines() if line.startswith(("prepare: 200", "Running entrypoint"))]
    assert len(lines) == 2, "lines are missing or repeated after the cut"


@pytest.mark.soak
def test_a_job_whose_driver_was_killed_is_resumed_by_the_same_submission(jobs: Jobs) -> None:
    process = jobs.start("killed")
    jobs.wait(lambda: jobs.steps("killed") >= 3, process)
    end_all(jobs.head.job_drivers(MODULE))
    dead = finish(process)
    assert dead.code == 1, dead
    said = jobs.submit("killed")
    assert said.code == 0, said
    assert said.result["job"] == f"{dead.result['job']}-2"
    assert "the attempt before it failed" in said.messages
    assert "prepare reused, spectra reused" in said.log
    assert len(parents(Bench(jobs.folder).mlflow("killed"))) == 1


@pytest.mark.soak
def test_ctrl_c_at_a_terminal_asks_whether_to_stop_the_job(jobs: Jobs) -> None:
    ours, theirs = pty.openpty()
    process = jobs.start("stopped", terminal=theirs)
    os.close(theirs)
    jobs.wait(lambda: bool(jobs.head.job_drivers(MODULE)) and (jobs.folder / "stopped").exists(), process)
    process.send_signal(signal.SIGINT)
    heard = hear(ours, "Stop the job, too?")
    os.write(ours, b"y\n")
    said = finish(process)
    os.close(ours)
    assert "Stop the job, too?" in heard
    assert said.code == 130, said
    assert said.result["status"] == "STOPPED"
    again = jobs.submit("stopped", "--no-follow")
    assert (again.code, again.result["attempt"]) == (0, 2), again
    assert "ray job logs --follow" in again.messages
    followed = jobs.submit("stopped")
    assert (followed.code, followed.result["attempt"]) == (0, 2), followed


@pytest.mark.soak
def test_a_client_without_a_token_is_told_what_to_set(jobs: Jobs) -> None:
    outsider = Jobs(jobs.folder, Head(jobs.head.address, {"RAY_AUTH_MODE": "disabled"}, jobs.head.process))
    said = outsider.submit("outsider")
    assert said.code == 2, said
    assert "RAY_AUTH_TOKEN_PATH" in said.messages


@pytest.mark.soak
def test_the_documented_ray_job_submit_succeeds_and_fails_as_the_job_does(jobs: Jobs) -> None:
    inputs = [f"base.model={jobs.folder / 'base'}", f"workspace={jobs.folder / 'plain'}"]
    command = ["--working-dir", ".", "--", "python", "-m", MODULE, str(jobs.folder / "recipe.yaml"), *inputs]
    good = ray_job_submit(jobs.head, ROOT, [*command, f"data.train={jobs.folder / 'rows.jsonl'}"])
    assert good.returncode == 0, good
    assert list((jobs.folder / "plain" / "reports").glob("*.html"))
    bad = ray_job_submit(jobs.head, ROOT, [*command, "data.train=/nowhere/rows.jsonl"])
    assert bad.returncode == 1, bad
    assert "failed with exit code 2" in bad.stdout + bad.stderr
