"""Waiting for a tracking server that is away: which errors mean that, and calls that are tried again until it is back.

Everything the driver asks of MLflow goes through `patient`; only what must not wait (metrics during training, the end of
a run that failed) does not, and then decides with `absence` itself.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar, cast

import requests

from pipeline.console import console
from pipeline.errors import TrackingAwayError, WorkspaceError

PATIENCE_VARIABLE = "KASA_TRACKING_PATIENCE_S"
DEFAULT_PATIENCE_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
# A connection that was lost once is no outage worth a line.
_SILENT_TRIES = 1

_AWAY_STATUS = {408, 429, 500, 502, 503, 504}
_AWAY_CODES = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"}
# What a database says of itself that will not pass by waiting.
_LASTING = ("disk is full", "disk i/o", "readonly", "unable to open", "no such table", "malformed", "not a database")

_WORDS = {
    "refused": "connection refused",
    "timed out": "no answer in time",
    "resolve": "its name is not known",
    "reset": "connection lost",
    "aborted": "connection lost",
}

Result = TypeVar("Result")
Target = TypeVar("Target")


def absence(error: BaseException) -> str | None:
    """Why the tracking store is away, in a few words, if that is what `error` means; None for any other error.

    Away means that the same call may succeed later: no connection, no answer in time, a server or database that answers
    with an error of its own. A refusal (no such run, no permission) is not that, nor is a full disk here.
    """
    links = list(_chain(error))
    texts = " ".join(str(link) for link in links).lower()
    if any(isinstance(link, requests.exceptions.SSLError | requests.exceptions.InvalidURL) for link in links):
        return None
    if any(type(link).__name__ == "OperationalError" for link in links):  # SQLAlchemy's, and the database driver's own
        return None if any(mark in texts for mark in _LASTING) else "its database is busy or away"
    for link in links:
        if isinstance(link, requests.exceptions.RequestException | ConnectionError | TimeoutError):
            return _request_words(link, texts)
    code = getattr(error, "error_code", None)
    return f"it answers with {code}" if code in _AWAY_CODES else None


def patience_s() -> float:
    """How long a call waits for an absent server, in seconds: KASA_TRACKING_PATIENCE_S, or ten minutes.

    Raises:
        WorkspaceError: the variable is no number of seconds.
    """
    text = os.environ.get(PATIENCE_VARIABLE, "")
    try:
        seconds = float(text or DEFAULT_PATIENCE_S)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise WorkspaceError(f"{PATIENCE_VARIABLE} is {text!r}; give a number of seconds, 0 or more")
    return seconds


def pauses() -> Iterator[float]:
    """Seconds to wait before each new try: growing, then steady."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)


def keep_trying(
    call: Callable[[], Result],
    where: str,
    patience: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda line: console.print(line, markup=False, soft_wrap=True),
) -> Result:
    """`call()`, again and again while the store at `where` is away; says so once, and once more when it is back.

    Args:
        patience: seconds after which it is given up.

    Raises:
        TrackingAwayError: it was away for longer; the message says what to do.
    """
    began, said = clock(), False
    for tries, pause in enumerate(pauses()):
        try:
            result = call()
        except Exception as error:
            why = absence(error)
            if why is None:
                raise
            waited = clock() - began
            if waited >= patience:
                raise TrackingAwayError(
                    f"MLflow at {where} has been away for {waited:.0f} s ({why}); what was made is kept: start the "
                    f"server and run the same command again ({PATIENCE_VARIABLE} sets how long is waited)"
                ) from error
            if tries >= _SILENT_TRIES and not said:
                say(f"MLflow at {where} is away ({why}); waiting for it, {patience:.0f} s at most")
                said = True
            sleep(min(pause, patience - waited))
        else:
            if said:
                say(f"MLflow at {where} is back after {clock() - began:.0f} s")
            return result
    raise AssertionError("pauses never end")


def patient(target: Target, where: str, patience: float) -> Target:
    """`target` with methods that are tried again while the store is away, each as a whole."""
    return cast(Target, _Patient(target, where, patience))


class _Patient:
    def __init__(self, target: Any, where: str, patience: float) -> None:
        self._target, self._where, self._patience = target, where, patience

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value

        @wraps(value)
        def call(*arguments: Any, **options: Any) -> Any:
            return keep_trying(lambda: value(*arguments, **options), self._where, self._patience)

        return call


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from. MLflow's own errors hide their cause in the context."""
    link: BaseException | None = error
    for _ in range(8):
        if link is None:
            return
        yield link
        hidden = type(link).__module__.startswith("mlflow")
        link = link.__cause__ or (link.__context__ if hidden else None) or getattr(link, "orig", None)


def _request_words(error: BaseException, texts: str) -> str | None:
    response = getattr(error, "response", None)
    if isinstance(error, requests.exceptions.HTTPError) and response is not None:
        return f"it answers with error {response.status_code}" if response.status_code in _AWAY_STATUS else None
    if found := re.search(r"too many (\d+) error", texts):
        return f"it answers with error {found[1]}"
    if isinstance(error, requests.exceptions.Timeout | TimeoutError):
        return "no answer in time"
    return next((words for mark, words in _WORDS.items() if mark in texts), "no connection")
