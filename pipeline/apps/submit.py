"""`kasa submit`: check a recipe, submit it as a job or find the job that it already is, and follow it to its end.

The connection to the cluster may break meanwhile; the job goes on without anybody.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kasa.errors import nearest
from pipeline.apps.job_client import FAILED, RUNNING, STOPPED, SUCCEEDED, Dashboard, JobState, Next, first_id, next_step
from pipeline.apps.job_package import Package, check_inputs, make_package, write_package
from pipeline.config.recipe import Recipe, load_recipe, recipe_values
from pipeline.core import stopping
from pipeline.core.console import console
from pipeline.core.errors import ClusterError, ConnectionLostError, JobError
from pipeline.core.redaction import redacted, shell_command
from pipeline.run.preflight import check_before_work

# Seconds that a dashboard may be away, and seconds between attempts to reach it.
PATIENCE_S, PAUSE_S = 60.0, 2.0
# After so many silent seconds the job's state is asked for: a broken connection is silent too.
_SILENCE_S = 15.0

# Variables that decide where results go: the same recipe with other results is another job.
_PLACES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL")
_PASSED_ON = (
    *_PLACES,
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_DEFAULT_REGION",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
)
_STOP_S = 30.0
INTERRUPTED = 130


class Followed(Protocol):
    """The part of `pipeline.apps.job_client.Dashboard` that following a job needs."""

    def state(self, submission_id: str) -> JobState: ...
    def whole_log(self, submission_id: str) -> str: ...
    def log_pieces(self, submission_id: str) -> AsyncIterator[str]: ...


def follow(
    dashboard: Followed,
    job: str,
    write: Callable[[str], None],
    say: Callable[[str], None],
    patience_s: float = PATIENCE_S,
    pause_s: float = PAUSE_S,
) -> JobState:
    """Pass on what a job writes, each part once, until the job ends.

    Args:
        dashboard: the cluster.
        job: submission id of the job.
        write: takes pieces of the log.
        say: takes remarks on the connection.
        patience_s: seconds that the dashboard may be away.
        pause_s: seconds between attempts to reach it.

    Raises:
        ConnectionLostError: the dashboard stayed away for `patience_s`.
    """
    return asyncio.run(_Follower(dashboard, job, write).to_the_end(say, patience_s, pause_s))


def exit_code_of(state: JobState) -> int:
    """The exit code of an ended job: that of its command, or 1 where a signal or the cluster ended it."""
    if state.status == SUCCEEDED:
        return 0
    code = state.exit_code or 1
    return code if state.status != STOPPED and 0 < code < 126 else 1


class _Follower:
    def __init__(self, dashboard: Followed, job: str, write: Callable[[str], None]) -> None:
        self._dashboard, self._job, self._write = dashboard, job, write
        self._written = 0

    async def to_the_end(self, say: Callable[[str], None], patience_s: float, pause_s: float) -> JobState:
        lost_since: float | None = None
        while True:
            try:
                await self._pass_on()
                state = await asyncio.to_thread(self._dashboard.state, self._job)
                if state.ended:
                    await self._rest()
                    return state
                lost_since = None
            except ConnectionLostError as error:
                if lost_since is None:
                    lost_since = time.monotonic()
                    say(f"the connection to the dashboard is lost ({error}); trying again for {patience_s:g} s")
                elif time.monotonic() - lost_since > patience_s:
                    raise
            await asyncio.sleep(pause_s)

    async def _pass_on(self) -> None:
        """Pass the log on until it ends, or until the job turns out to have ended silently."""
        pieces = self._dashboard.log_pieces(self._job)
        position = 0  # a log is always sent from its beginning
        coming = asyncio.ensure_future(anext(pieces, None))
        try:
            while True:
                done, _ = await asyncio.wait([coming], timeout=_SILENCE_S)
                if not done:
                    if (await asyncio.to_thread(self._dashboard.state, self._job)).ended:
                        return
                    continue
                piece = coming.result()
                if piece is None:
                    return
                new = piece[max(0, self._written - position) :]
                position += len(piece)
                if new:
                    self._write(new)
                    self._written += len(new)
                coming = asyncio.ensure_future(anext(pieces, None))
        finally:
            coming.cancel()
            with suppress(asyncio.CancelledError, ConnectionLostError):
                await coming

    async def _rest(self) -> None:
        # The job's node may be gone, and its log with it.
        with suppress(ConnectionLostError):
            if rest := (await asyncio.to_thread(self._dashboard.whole_log, self._job))[self._written :]:
                self._write(rest)
                self._written += len(rest)


@dataclass(frozen=True)
class Outcome:
    """The result of a submission.

    Attributes:
        job: submission id of the attempt.
        attempt: its number, counted from 1.
        address: of the cluster's dashboard.
        status: Ray's status of the job when it was last asked for.
        exit_code: of this command; that of the job, if it was followed to its end.
    """

    job: str
    attempt: int
    address: str
    status: str
    exit_code: int

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dict(vars(self))


def submit_and_follow(
    recipe_file: Path,
    overrides: Sequence[str],
    address: str | None,
    follow_it: bool,
    again: bool,
    variables: Sequence[str],
) -> Outcome:
    """Submit a recipe as a job, unless it is one already, and follow it to its end.

    Args:
        recipe_file: the recipe.
        overrides: changes to it.
        address: of the cluster's dashboard.
        follow_it: whether to follow the job.
        again: whether to start another attempt although the job has succeeded.
        variables: `NAME` or `NAME=VALUE`, environment variables for the job beside those that are always passed on.

    Raises:
        KasaError: the recipe is wrong or cannot run elsewhere, or the cluster cannot be used; nothing has been sent.
    """
    recipe = load_recipe(recipe_file, list(overrides))
    folder = Path.cwd()
    needed = check_inputs(recipe, recipe_file, folder)
    for line in check_before_work(recipe, elsewhere=True).not_checked:
        _say(f"not checked: {line}")
    environment = passed_environment(os.environ, variables)
    package = make_package(folder, needed, recipe.workspace)
    if address is None:
        raise ClusterError(
            "name the cluster's dashboard with --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS"
        )
    command = shlex.join(["python", "-m", "ray_jobs.run_pipeline", str(needed[0].relative_to(folder)), *overrides])
    places = {name: redacted(environment[name]) for name in _PLACES if name in environment}
    first = first_id(recipe.name, recipe_values(recipe), package.digest, places)
    try:
        dashboard = Dashboard(address)
        step = next_step(first, dashboard.statuses(), again)
        if step.action == "submit" and not _send(dashboard, step, recipe, command, package, environment):
            step = next_step(first, dashboard.statuses())  # someone else has just submitted it
    except ConnectionLostError as error:
        raise ClusterError(
            f"{address} stopped answering: {error}; submit again, the same job is not made twice"
        ) from error
    _say_step(step, dashboard.address)
    if step.action == "done":
        return Outcome(step.id, step.attempt, dashboard.address, SUCCEEDED, 0)
    if not follow_it:
        _say(how_to_follow(step.id, dashboard.address))
        return Outcome(step.id, step.attempt, dashboard.address, RUNNING, 0)
    return _follow(dashboard, step)


def passed_environment(surroundings: Mapping[str, str], variables: Sequence[str]) -> dict[str, str]:
    """The environment variables that the job gets.

    Raises:
        JobError: a variable given by name alone is not set here.
    """
    passed = {name: surroundings[name] for name in _PASSED_ON if name in surroundings}
    for variable in variables:
        name, has_value, value = variable.partition("=")
        if not has_value and name not in surroundings:
            raise JobError(
                f"--env {name} is not set here{nearest(name, surroundings)}; set it, or give --env {name}=VALUE"
            )
        passed[name] = value if has_value else surroundings[name]
    return passed


def how_to_follow(job: str, address: str) -> str:
    """Commands to follow or stop a job later."""
    logs = shell_command("ray", "job", "logs", "--follow", "--address", address, job)
    stop = shell_command("ray", "job", "stop", "--address", address, job)
    return f"follow it with `{logs}` or the same command again, stop it with `{stop}`"


def _send(
    dashboard: Dashboard, step: Next, recipe: Recipe, command: str, package: Package, environment: Mapping[str, str]
) -> bool:
    with tempfile.TemporaryDirectory(prefix="kasa-job-") as scratch:
        archive = Path(scratch) / "package.zip"
        write_package(package, archive)
        size = archive.stat().st_size / 2**20
        _say(f"sending {len(package.files):,} files ({size:,.1f} MiB) to {dashboard.address}")
        metadata = {"job_name": recipe.name, "kasa.attempt": str(step.attempt)}
        return dashboard.submit(step.id, command, archive, environment, metadata)


def _say_step(step: Next, address: str) -> None:
    if step.action == "done":
        _say(f"job {step.id} has succeeded already; nothing to do (--again runs it again)")
    elif step.action == "follow":
        _say(f"job {step.id} is there already; {address}/#/jobs/{step.id}")
    else:
        words = {FAILED: "failed", STOPPED: "was stopped", SUCCEEDED: "succeeded"}
        before = f"; the attempt before it {words[step.after]}, and it resumes from there" if step.after else ""
        _say(f"job {step.id} started{before}; {address}/#/jobs/{step.id}")


def _follow(dashboard: Dashboard, step: Next) -> Outcome:
    try:
        state = follow(dashboard, step.id, _write, _say)
    except ConnectionLostError as error:
        _say(
            f"failed: the dashboard stays away ({error}); the job goes on; {how_to_follow(step.id, dashboard.address)}"
        )
        return Outcome(step.id, step.attempt, dashboard.address, RUNNING, 1)
    except KeyboardInterrupt:
        return Outcome(step.id, step.attempt, dashboard.address, _interrupted(dashboard, step.id), INTERRUPTED)
    code = exit_code_of(state)
    _say_end(state, step.id, code)
    return Outcome(step.id, step.attempt, dashboard.address, state.status, code)


def _say_end(state: JobState, job: str, code: int) -> None:
    if state.status == SUCCEEDED:
        _say(f"job {job} succeeded")
    elif state.status == STOPPED:
        _say(f"job {job} was stopped; the same command resumes it")
    elif state.exit_code is None:
        # Where the command has ended, Ray's message only repeats the end of the log.
        _say(f"job {job} failed: {state.message}; the same command resumes it")
    else:
        remedy = "mend that and submit again" if code == 2 else "the same command resumes it"
        _say(f"job {job} failed with exit code {state.exit_code}; {remedy}")


def _interrupted(dashboard: Dashboard, job: str) -> str:
    """Ask the user whether to stop the job; returns its status after that."""
    goes_on = f"the job goes on; {how_to_follow(job, dashboard.address)}"
    with stopping.held(goes_on):
        if _stop_wanted():
            return _stopped(dashboard, job)
    _say(goes_on)
    return RUNNING


def _stopped(dashboard: Dashboard, job: str) -> str:
    """Stop the job; returns its status after that."""
    try:
        dashboard.stop(job)
        deadline = time.monotonic() + _STOP_S
        while not (state := dashboard.state(job)).ended and time.monotonic() < deadline:
            time.sleep(0.5)
    except ConnectionLostError as error:
        _say(f"the job could not be stopped ({error}); {how_to_follow(job, dashboard.address)}")
        return RUNNING
    _say(f"job {job} was stopped; the same command resumes it" if state.ended else f"job {job} is stopping")
    return state.status


def _stop_wanted() -> bool:
    # Whoever sends SIGTERM waits for no answer.
    if stopping.requested() == signal.SIGTERM or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    console.print("\nStop the job, too? [y/N] ", end="", markup=False)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
