"""Ids of jobs, and what a submission means given the jobs on the cluster: pure functions.

A job's id is derived from what the job would do, so that the same submission twice is one job. Ray refuses an id that was used
before and never runs a job again, so a job that did not succeed is followed by another attempt under a derived id.

The door to Ray's Jobs API: a client that speaks HTTP to a cluster's dashboard and starts no Ray of its own.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.core.errors import ClusterError, ConnectionLostError, cause_line
from pipeline.core.files import content_digest

PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED = "PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"
ENDED = frozenset({STOPPED, SUCCEEDED, FAILED})


@dataclass(frozen=True)
class Next:
    """What a submission has to do.

    Attributes:
        action: `submit` an attempt, `follow` one that exists, or nothing, since it is `done`.
        id: the attempt's submission id.
        attempt: its number, counted from 1.
        after: status in which the attempt before it ended, if it is not the first.
    """

    action: Literal["submit", "follow", "done"]
    id: str
    attempt: int
    after: str | None = None


def first_id(name: str, recipe: Mapping[str, Any], package: str, environment: Mapping[str, str]) -> str:
    """The id of a job's first attempt: the recipe's name, and a digest of everything that decides what the job does.

    Args:
        name: the recipe's name.
        recipe: the resolved recipe's values.
        package: digest of the files that the job takes along.
        environment: the variables that decide where results go. Secrets are left out, since a new one makes no other job.
    """
    whole = content_digest({"recipe": dict(recipe), "package": package, "environment": dict(environment)})
    return f"kasa-{name}-{whole[:12]}"


def next_step(first: str, statuses: Mapping[str, str], again: bool = False) -> Next:
    """Decide what to do by the status of the newest attempt.

    Args:
        first: id of the first attempt.
        statuses: submission id -> status of all jobs on the cluster.
        again: whether to start another attempt although the newest succeeded.
    """
    newest = 0
    while attempt_id(first, newest + 1) in statuses:
        newest += 1
    if newest == 0:
        return Next("submit", first, 1)
    status = statuses[attempt_id(first, newest)]
    if status not in ENDED:
        return Next("follow", attempt_id(first, newest), newest)
    if status == SUCCEEDED and not again:
        return Next("done", attempt_id(first, newest), newest)
    return Next("submit", attempt_id(first, newest + 1), newest + 1, status)


def attempt_id(first: str, attempt: int) -> str:
    """The id of an attempt by its number, counted from 1."""
    return first if attempt == 1 else f"{first}-{attempt}"


Result = TypeVar("Result")

# Ray's client has no time-out of its own. Uploading a package takes longer than any other request.
_ANSWER_S, _UPLOAD_S = 20.0, 900.0


@dataclass(frozen=True)
class JobState:
    """The state of a job.

    Attributes:
        status: Ray's status.
        exit_code: of the job's command, if that has ended.
        message: Ray's explanation.
    """

    status: str
    exit_code: int | None
    message: str

    @property
    def ended(self) -> bool:
        """Whether the job is over."""
        return self.status in ENDED


class Dashboard:
    """The jobs of a cluster. Every method raises `ConnectionLostError` where the dashboard does not answer."""

    def __init__(self, address: str) -> None:
        """Connect.

        Args:
            address: `http://HOST:PORT`, or https.

        Raises:
            ClusterError: nothing answers there, it is no Ray dashboard, or it wants another token.
        """
        self.address = address.rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise ClusterError(f"--address {address} must be that of Ray's dashboard, such as http://HEAD:8265")
        # Ray prefers the address in the environment to the one that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
        try:
            self._client = _within(_ANSWER_S, lambda: JobSubmissionClient(self.address))
        except AuthenticationError:
            raise ClusterError(
                f"the cluster at {self.address} wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, with the "
                "file that its head was started with"
            ) from None
        except Exception as error:  # requests, JSON and Ray raise unrelated types
            raise ClusterError(
                f"no Ray dashboard answers at {self.address}: {cause_line(error)}; is the head running, and was it started "
                "with the dashboard (`ray start --head`, port 8265)?"
            ) from None

    def statuses(self) -> dict[str, str]:
        """The status of all submitted jobs by their submission id."""
        jobs = self._ask(self._client.list_jobs)
        return {job.submission_id: str(job.status) for job in jobs if job.submission_id}

    def submit(
        self, submission_id: str, command: str, package: Path, environment: Mapping[str, str], metadata: dict[str, str]
    ) -> bool:
        """Upload the package and start the job; returns false if a job of that id exists already."""
        runtime = {"working_dir": str(package), "env_vars": dict(environment)}
        try:
            _within(
                _UPLOAD_S,
                lambda: self._client.submit_job(
                    entrypoint=command, submission_id=submission_id, runtime_env=runtime, metadata=metadata
                ),
            )
        except RuntimeError as error:  # what Ray raises for any refusal
            if submission_id in self.statuses():
                return False
            raise ClusterError(f"the cluster at {self.address} refuses the job: {cause_line(error)}") from error
        except Exception as error:  # requests and urllib3
            raise ConnectionLostError(cause_line(error)) from error
        return True

    def state(self, submission_id: str) -> JobState:
        """The state of a job."""
        details: Any = self._ask(lambda: self._client.get_job_info(submission_id))
        return JobState(str(details.status), details.driver_exit_code, details.message or "")

    def stop(self, submission_id: str) -> None:
        """Have Ray stop a job: SIGTERM, and after a few seconds SIGKILL."""
        self._ask(lambda: self._client.stop_job(submission_id))

    def whole_log(self, submission_id: str) -> str:
        """Everything that a job has written so far."""
        return self._ask(lambda: self._client.get_job_logs(submission_id))

    async def log_pieces(self, submission_id: str) -> AsyncIterator[str]:
        """What a job writes, from its beginning and as it comes, until the job ends."""
        try:
            async for piece in self._client.tail_job_logs(submission_id):
                yield piece
        except Exception as error:  # aiohttp's and Ray's own
            raise ConnectionLostError(cause_line(error)) from error

    def _ask(self, call: Callable[[], Result]) -> Result:
        try:
            return _within(_ANSWER_S, call)
        except Exception as error:  # Ray's, requests' and urllib3's
            raise ConnectionLostError(cause_line(error)) from error


def _within(patience_s: float, call: Callable[[], Result]) -> Result:
    """Run a call in a daemon thread and return its result; after `patience_s` seconds leave it alone and raise TimeoutError."""
    answers: queue.Queue[tuple[Result | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = answers.get(timeout=patience_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {patience_s:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
