"""What is done to jobs on a real Ray head, by the check `ray-jobs` and the tests: each scenario says what went wrong.

Every scenario uses a workspace of its own, named after it, in the bench's folder.
"""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.core.journal import read_journal
from tests.support import ROOT
from tests.support.cut import door_to
from tests.support.processes import end_all
from tests.support.ray_head import Head, plain_environment, ray_job_submit

PATIENCE_S = 400.0
MODULE = "ray_jobs.run_pipeline"


@dataclass
class Findings:
    """Expectations that were looked at, and those that failed."""

    looked_at: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def expect(self, what: str, holds: bool, otherwise: object = "") -> None:
        """Note an expectation; `otherwise` is shown where it does not hold."""
        self.looked_at.append(what)
        if not holds:
            self.failed.append(f"{what}: {str(otherwise)[-1500:]}")


@dataclass(frozen=True)
class Jobs:
    """A folder with the tiny inputs, and the head that its recipe is sent to."""

    folder: Path
    head: Head

    def start(
        self, workspace: str, *arguments: str, address: str = "", terminal: int | None = None
    ) -> subprocess.Popen[str]:
        """`kasa submit recipe.yaml --json` with a workspace in the folder; `terminal` is its stdin and stderr."""
        submit = [
            sys.executable,
            "-m",
            "pipeline.cli.main",
            "submit",
            "recipe.yaml",
            f"workspace={self.folder / workspace}",
        ]
        return subprocess.Popen(
            [*submit, *arguments, "--address", address or self.head.address, "--json"],
            cwd=self.folder,
            env={**plain_environment(), **self.head.environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            start_new_session=True,
            # Shells let what they start in the background ignore Ctrl-C, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )

    def submit(self, workspace: str, *arguments: str) -> Said:
        """The same, to its end."""
        return finish(self.start(workspace, *arguments))

    def statuses(self) -> dict[str, str]:
        """All jobs on the head, by Ray's own client."""
        script = (
            "import json, sys; from ray.job_submission import JobSubmissionClient as C; "
            "print(json.dumps({j.submission_id: str(j.status) for j in C(sys.argv[1]).list_jobs() if j.submission_id}))"
        )
        environment = {**plain_environment(), **self.head.environment}
        command = [sys.executable, "-c", script, self.head.address]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
        return json.loads(out.splitlines()[-1])

    def steps(self, workspace: str) -> int:
        """How far the training in progress is."""
        files = list((self.folder / workspace / "artifacts" / "train").glob("*.partial/journal.jsonl"))
        return max((record.get("step", 0) for file in files for record in read_journal(file)), default=0)

    def wait(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """Until the condition holds; the process must live until then."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"seen too late, or not at all: {finish(process)}")
            time.sleep(0.02)


@dataclass(frozen=True)
class Said:
    """How `kasa submit` ended: exit code, its JSON object, the job's log and what it said itself."""

    code: int
    result: Mapping[str, object]
    log: str
    messages: str


def finish(process: subprocess.Popen[str]) -> Said:
    """Wait for the end of `Jobs.start`."""
    out, err = process.communicate(timeout=PATIENCE_S)
    log, _, last = out.rstrip("\n").rpartition("\n")
    result = json.loads(last) if last.startswith("{") else {}
    return Said(process.returncode, result, log if result else out, err or "")


def missing_data(jobs: Jobs, found: Findings) -> None:
    """A mistake that only the cluster can see: the job's own exit code, and its message in the log.

    Whatever cluster RAY_ADDRESS names, the job goes where `--address` says.
    """
    elsewhere = Head(jobs.head.address, jobs.head.environment | {"RAY_ADDRESS": "127.0.0.1:9"}, jobs.head.process)
    said = Jobs(jobs.folder, elsewhere).submit("missing", "data.train=/nowhere/rows.jsonl")
    found.expect("missing data: exit code 2", said.code == 2, said)
    found.expect("missing data: the log says so", "/nowhere/rows.jsonl does not exist" in said.log, said)
    found.expect("missing data: the job failed", said.result.get("status") == "FAILED", said)


def twice_is_one_job(jobs: Jobs, found: Findings, *overrides: str) -> None:
    """A job that succeeds; then the same submission again."""
    said = jobs.submit("twice", "--env", "MLFLOW_TRACKING_USERNAME=nobody", *overrides)
    found.expect("submit: exit code 0", said.code == 0, said)
    found.expect("submit: the log is shown", all(f"{stage}:" in said.log for stage in ("prepare", "train")), said)
    found.expect("submit: the run is complete", bool(list((jobs.folder / "twice/reports").glob("*.html"))), said)
    before = jobs.statuses()
    again = jobs.submit("twice", *overrides)
    found.expect("again: exit code 0", again.code == 0, again)
    found.expect("again: the same job", again.result.get("job") == said.result.get("job"), again)
    found.expect("again: says that it is done", "has succeeded already" in again.messages, again)
    found.expect("again: no other job", jobs.statuses() == before, before)


def two_at_once(jobs: Jobs, found: Findings) -> None:
    """Two submissions at the same time follow one job; Ctrl-C on one leaves it running, a cut connection heals."""
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
    found.expect("two at once: one job", left.result.get("job") == followed.result.get("job") != None, (left, followed))  # noqa: E711
    found.expect("Ctrl-C without a terminal: exit code 130", left.code == 130, left)
    found.expect("Ctrl-C without a terminal: says how to stop it", "the job goes on" in left.messages, left)
    found.expect("cut connection: says so", "connection to the dashboard is lost" in followed.messages, followed)
    found.expect("cut connection: followed to the end", followed.code == 0, followed)
    lines = [line for line in followed.log.splitlines() if line.startswith(("prepare: 200", "Running entrypoint"))]
    found.expect("cut connection: each line once", len(lines) == 2, followed)


def killed_driver(jobs: Jobs, found: Findings) -> None:
    """SIGKILL to the job's driver in the middle of training: the same submission goes on in a second attempt."""
    process = jobs.start("killed")
    jobs.wait(lambda: jobs.steps("killed") >= 3, process)
    end_all(jobs.head.job_drivers(MODULE))
    dead = finish(process)
    found.expect("killed driver: exit code 1", dead.code == 1, dead)
    done = jobs.steps("killed")
    said = jobs.submit("killed")
    found.expect("killed driver: goes on, exit code 0", said.code == 0, said)
    found.expect("killed driver: second attempt", said.result.get("job") == f"{dead.result.get('job')}-2", said)
    found.expect("killed driver: says what was before", "the attempt before it failed" in said.messages, said)
    found.expect("killed driver: prepared data is reused", "prepare reused, spectra reused" in said.log, said)
    runs = _parents(jobs.folder / "killed")
    found.expect("killed driver: one run in MLflow", len(runs) == 1, (runs, done))


def stopped_at_a_terminal(jobs: Jobs, found: Findings) -> None:
    """Ctrl-C at a terminal asks; yes stops the job, and the same submission starts another attempt."""
    ours, theirs = pty.openpty()
    process = jobs.start("stopped", terminal=theirs)
    os.close(theirs)
    jobs.wait(lambda: bool(jobs.head.job_drivers(MODULE)) and (jobs.folder / "stopped").exists(), process)
    process.send_signal(signal.SIGINT)
    heard = _hear(ours, "Stop the job, too?")
    os.write(ours, b"y\n")
    said = finish(process)
    found.expect("Ctrl-C at a terminal: asks", "Stop the job, too?" in heard, heard)
    found.expect("Ctrl-C at a terminal: exit code 130", said.code == 130, said)
    found.expect("Ctrl-C at a terminal: the job is stopped", said.result.get("status") == "STOPPED", said)
    os.close(ours)
    again = jobs.submit("stopped", "--no-follow")
    found.expect("stopped job: another attempt", again.result.get("attempt") == 2 and again.code == 0, again)
    found.expect("--no-follow: says how to follow", "ray job logs --follow" in again.messages, again)
    followed = jobs.submit("stopped")
    found.expect("stopped job: runs to its end", followed.code == 0 and followed.result.get("attempt") == 2, followed)


def without_token(jobs: Jobs, found: Findings) -> None:
    """A client that has no token is told which variables to set."""
    outsider = Jobs(jobs.folder, Head(jobs.head.address, {"RAY_AUTH_MODE": "disabled"}, jobs.head.process))
    said = outsider.submit("outsider")
    found.expect("no token: exit code 2", said.code == 2, said)
    found.expect("no token: says what to set", "RAY_AUTH_TOKEN_PATH" in said.messages, said)


def plain_ray_jobs(jobs: Jobs, found: Findings) -> None:
    """The documented `ray job submit`, from the repository's root, succeeding and failing."""
    inputs = [f"base.model={jobs.folder / 'base'}", f"workspace={jobs.folder / 'plain'}"]
    command = ["--working-dir", ".", "--", "python", "-m", MODULE, str(jobs.folder / "recipe.yaml"), *inputs]
    good = ray_job_submit(jobs.head, ROOT, [*command, f"data.train={jobs.folder / 'rows.jsonl'}"])
    found.expect("ray job submit: exit code 0", good.returncode == 0, good)
    found.expect(
        "ray job submit: the run is complete", bool(list((jobs.folder / "plain/reports").glob("*.html"))), good
    )
    bad = ray_job_submit(jobs.head, ROOT, [*command, "data.train=/nowhere/rows.jsonl"])
    found.expect("ray job submit: failure is a failure", bad.returncode == 1, bad)
    found.expect("ray job submit: the job's own exit code", "failed with exit code 2" in bad.stdout + bad.stderr, bad)


SCENARIOS: tuple[Callable[[Jobs, Findings], None], ...] = (
    without_token,
    missing_data,
    twice_is_one_job,
    two_at_once,
    killed_driver,
    stopped_at_a_terminal,
    plain_ray_jobs,
)


def _hear(terminal: int, until: str) -> str:
    heard, deadline = "", time.monotonic() + 60
    while until not in heard and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                heard += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                break
    return heard


def _parents(workspace: Path) -> list[str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "tiny"]
    runs = client.search_runs([experiment.experiment_id])
    return [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
