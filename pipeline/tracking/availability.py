"""What errors of MLflow's store mean: away for now and to be waited for, absent, or refused."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar, cast

from pipeline.core import stopping
from pipeline.core.console import console
from pipeline.core.errors import TrackingAwayError, WorkspaceError, one_line
from pipeline.core.machine import backoff_s
from pipeline.core.redaction import redacted

Result = TypeVar("Result")
Target = TypeVar("Target")
RETRY_VARIABLE = "KASA_TRACKING_PATIENCE_S"
DEFAULT_RETRY_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
# A connection that was lost once is no outage worth a line.
_SILENT_TRIES = 1
_UNAVAILABLE_STATUS = {408, 429, 500, 502, 503, 504}
_UNAVAILABLE_CODES = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"}
_REFUSALS = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
# Marks of database errors that retrying does not help against. Of SQLite's own errors, only that of a lock passes.
_LASTING = ("disk is full", "disk i/o", "readonly", "unable to open", "no such table", "malformed", "not a database")
_SQLITE_BUSY = ("locked", "busy")
_WORDS = {
    "refused": "connection refused",
    "timed out": "no answer in time",
    "resolve": "its name is not known",
    "reset": "connection lost",
    "aborted": "connection lost",
}


def retry_limit_s() -> float:
    """For how many seconds a call is retried: KASA_TRACKING_PATIENCE_S, or ten minutes.

    Raises:
        WorkspaceError: The variable is no number of seconds.
    """
    text = os.environ.get(RETRY_VARIABLE, "")
    try:
        seconds = float(text or DEFAULT_RETRY_S)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise WorkspaceError(f"{RETRY_VARIABLE} is {text!r}; give a number of seconds, 0 or more")
    return seconds


def retry(
    call: Callable[[], Result],
    where: str,
    limit_s: float,
    sleep: Callable[[float], None] = stopping.pause,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda line: console.print(line, markup=False, soft_wrap=True),
) -> Result:
    """The result of `call()`, which is repeated while the store at `where` is unavailable.

    An outage is announced once, and so is its end.

    Args:
        limit_s: Seconds after which no further attempt is made.

    Raises:
        TrackingAwayError: The store was unavailable for longer. The message says what to do.
        WorkspaceError: The server refuses the call: it wants a login, or another one.
    """
    began, said = clock(), False
    for tries, pause in enumerate(backoff_s(FIRST_PAUSE_S, LONGEST_PAUSE_S)):
        try:
            result = call()
        except Exception as error:
            why = unavailable_reason(error)
            if why is None:
                if refused := refusal(error, where):
                    raise refused from error
                raise
            waited = clock() - began
            if waited >= limit_s:
                raise TrackingAwayError(
                    f"MLflow at {where} has been away for {waited:.0f} s ({why}); what was made is kept: start the "
                    f"server and run the same command again ({RETRY_VARIABLE} sets how long is waited)"
                ) from error
            if tries >= _SILENT_TRIES and not said:
                say(f"MLflow at {where} is away ({why}); waiting for it, {limit_s:.0f} s at most")
                said = True
            sleep(min(pause, limit_s - waited))
        else:
            if said:
                say(f"MLflow at {where} is back after {clock() - began:.0f} s")
            return result
    raise AssertionError("the pauses never end")


def retrying(target: Target, where: str, limit_s: float) -> Target:
    """`target` with every method call retried as a whole while the store is unavailable."""
    return cast(Target, _Retrying(target, where, limit_s))


def unavailable_reason(error: BaseException) -> str | None:
    """Why the store is unavailable, in a few words, if that is what `error` means; None for any other error.

    Unavailable means that the same call may succeed later: no connection, no answer in time, or a server or database that
    answers with an error of its own. A refusal (no such run, no permission) is something else, and so is a full disk.
    """
    import requests  # MLflow has loaded it by then; commands that find nothing to do go without

    links = list(_chain(error))
    texts = " ".join(str(link) for link in links).lower()
    if any(isinstance(link, requests.exceptions.SSLError | requests.exceptions.InvalidURL) for link in links):
        return None
    if any(type(link).__name__ == "OperationalError" for link in links):  # SQLAlchemy's, and the database driver's own
        is_sqlite = any(type(link).__module__ == "sqlite3" for link in links)
        passes = (
            any(mark in texts for mark in _SQLITE_BUSY) if is_sqlite else not any(mark in texts for mark in _LASTING)
        )
        return "its database is busy or away" if passes else None
    for link in links:
        if isinstance(link, requests.exceptions.HTTPError) and link.response is not None:
            status = link.response.status_code
            return f"it answers with error {status}" if status in _UNAVAILABLE_STATUS else None
        if isinstance(link, requests.exceptions.Timeout | TimeoutError):
            return _request_words(texts, "no answer in time")
        if isinstance(link, requests.exceptions.RequestException | ConnectionError):
            return _request_words(texts)
    code = getattr(error, "error_code", None)
    return f"it answers with {code}" if code in _UNAVAILABLE_CODES else None


def if_there(call: Callable[[], Result]) -> Result | None:
    """The result of a call that asks for one thing; None if the store says that it does not have it.

    Every other error is raised: what a server refuses to show, or cannot show now, may well be there.
    """
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def refusal(error: BaseException, where: str) -> WorkspaceError | None:
    """The error to raise where the server at `where` refuses a call for want of rights; None for any other error."""
    codes = {getattr(link, "error_code", None) for link in _chain(error)}
    answers = (getattr(getattr(link, "response", None), "status_code", None) for link in _chain(error))
    status = next((answer for answer in answers if answer in (401, 403)), None)
    if status is None and not codes & _REFUSALS:
        return None
    return WorkspaceError(
        f"MLflow at {where} refuses access ({redacted(one_line(error))}); set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to a login that may read and write there"
    )


class _Retrying:
    def __init__(self, target: Any, where: str, limit_s: float) -> None:
        self._target, self._where, self._limit_s = target, where, limit_s

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value

        @wraps(value)
        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return retry(lambda: value(*arguments, **options), self._where, self._limit_s)
            except Exception as error:
                if not name.startswith("set_") or "unique constraint" not in str(error).lower():
                    raise
                # Somebody else set the same for the first time in the same moment. Now it is there, and is set again.
                return retry(lambda: value(*arguments, **options), self._where, self._limit_s)

        return call


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes. MLflow's own errors have theirs in the context only."""
    link: BaseException | None = error
    for _ in range(8):
        if link is None:
            return
        yield link
        hidden = type(link).__module__.startswith("mlflow")
        link = link.__cause__ or (link.__context__ if hidden else None) or getattr(link, "orig", None)


def _request_words(texts: str, default: str = "") -> str:
    """Words for a request that got no answer. `too many 503 error responses` is urllib3's after retries of its own."""
    if found := re.search(r"too many (\d+) error", texts):
        return f"it answers with error {found[1]}"
    return default or next((words for mark, words in _WORDS.items() if mark in texts), "no connection")
