"""Ids of jobs, and what a submission means given the jobs there are: pure functions.

A job's id is made of what it would do, so that the same submission twice is one job. Ray refuses an id used before, and
never runs a job again; a job that did not succeed is therefore followed by another attempt under a derived id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.artifacts.store import content_digest

PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED = "PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"
ENDED = frozenset({STOPPED, SUCCEEDED, FAILED})


@dataclass(frozen=True)
class Next:
    """What to do: `submit` an attempt, `follow` one that is there, or nothing, since it is `done`.

    Attributes:
        id: the attempt's submission id.
        after: how the attempt before it ended, if it is not the first.
    """

    action: Literal["submit", "follow", "done"]
    id: str
    attempt: int
    after: str | None = None


def first_id(name: str, recipe: Mapping[str, Any], package: str, environment: Mapping[str, str]) -> str:
    """The id of a recipe's first attempt: the recipe's name, and a digest of everything that decides what the job does.

    Args:
        recipe: the resolved recipe's values.
        package: digest of the files that the job takes along.
        environment: what is passed on and decides where results go; no secret, which may change without meaning anything.
    """
    whole = content_digest({"recipe": dict(recipe), "package": package, "environment": dict(environment)})
    return f"kasa-{name}-{whole[:12]}"


def next_step(first: str, statuses: Mapping[str, str], again: bool = False) -> Next:
    """Decide by the newest attempt.

    Args:
        statuses: submission id -> status of all jobs on the cluster.
        again: start another attempt also where the newest succeeded.
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
    """The id of the attempt with that number, counted from 1."""
    return first if attempt == 1 else f"{first}-{attempt}"
