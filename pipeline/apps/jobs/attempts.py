"""Ids of jobs, and what a submission means given the jobs on the cluster: pure functions.

A job's id is derived from what the job would do, so that the same submission twice is one job. Ray refuses an id that was used
before and never runs a job again, so a job that did not succeed is followed by another attempt under a derived id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
