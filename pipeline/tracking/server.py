"""The connection to MLflow: which store a workspace uses, and calls that are retried while it is unavailable.

Everything the driver asks of MLflow goes through `retry`. Two things must not wait: metrics during a training, and the end
of a run that failed. They ask `unavailable_reason` themselves.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.core import stopping
from pipeline.core.console import console
from pipeline.core.errors import TrackingAwayError, WorkspaceError, one_line
from pipeline.core.files import make_once
from pipeline.core.machine import TIMEOUT_S, Finding, answers, backoff_s, connects, host_and_port
from pipeline.core.redaction import redacted, shell_command

Result = TypeVar("Result")
Target = TypeVar("Target")

DATABASE = "mlflow.db"
RETRY_VARIABLE = "KASA_TRACKING_PATIENCE_S"
DEFAULT_RETRY_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
# A connection that was lost once is no outage worth a line.
_SILENT_TRIES = 1

_UNAVAILABLE_STATUS = {408, 429, 500, 502, 503, 504}
_UNAVAILABLE_CODES = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"}
_DATABASE_PORTS = {"postgres": 5432, "mysql": 3306, "mssql": 1433}
_ANSWER_S = 10.0
_REFUSALS = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
# Marks of database errors that retrying does not help against. Of SQLite's own errors, only that of a lock passes.
_LASTING = ("disk is full", "disk i/o", "readonly", "unable to open", "no such table", "malformed", "not a database")
_SQLITE_BUSY = ("locked", "busy")

# How long SQLite waits for another process that is writing.
_BUSY_S = 30.0
# Where MLflow stores the places of files.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)

_WORDS = {
    "refused": "connection refused",
    "timed out": "no answer in time",
    "resolve": "its name is not known",
    "reset": "connection lost",
    "aborted": "connection lost",
}

# MLflow itself retries a request eight times, for minutes, silently, and may so create a run twice. Here `retry` decides
# when to try again. What the user has set stays.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # The pages of a laptop must not call home, and there may be no network at all.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(workspace: Path) -> str:
    """MLFLOW_TRACKING_URI if it is set, else the SQLite database in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or own_database(workspace)


def own_database(workspace: Path) -> str:
    """The URI of the SQLite database in the workspace."""
    return f"sqlite:///{workspace.resolve() / DATABASE}"


def own_files(workspace: Path) -> str:
    """The URI of the folder in the workspace where the files of its runs and models lie."""
    return (workspace.resolve() / "mlartifacts").as_uri()


def has_store(workspace: Path) -> bool:
    """Whether there is a store to read: a server is named, or a run has created the workspace's database."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (workspace / DATABASE).exists()


def ui_command(workspace: Path, mlflow: str) -> str:
    """The shell command that opens MLflow's pages on this workspace; `mlflow` is the program."""
    uri = tracking_uri(workspace)
    if uri.startswith("sqlite:"):
        return shell_command(mlflow, "ui", "--backend-store-uri", uri)
    return shell_command("open", uri)


def check_store(uri: str | None, timeout_s: float = TIMEOUT_S) -> Finding:
    """Check that the tracking server MLFLOW_TRACKING_URI answers, or that the folder of its database exists."""
    if not uri:
        return Finding("MLflow", "ok", "MLFLOW_TRACKING_URI not set: a database in the workspace")
    shown = f"MLFLOW_TRACKING_URI={redacted(uri)}"
    if uri.startswith(("http://", "https://")):
        return _check_server(redacted(uri), shown, timeout_s)
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        if folder.is_dir() and os.access(folder, os.W_OK):
            return Finding("MLflow", "ok", shown)
        remedy = shell_command("mkdir", "-p", folder)
        return Finding("MLflow", "fail", f"{shown}: folder {folder} is missing or read-only", remedy)
    if "://" not in uri or uri.startswith("file:"):
        remedy = "set MLFLOW_TRACKING_URI to sqlite:///PATH or to a server, or unset it"
        return Finding("MLflow", "fail", f"{shown} is a file store, which MLflow 3.17 refuses", remedy)
    return _check_database(uri, shown, timeout_s)


def _check_database(uri: str, shown: str, timeout_s: float) -> Finding:
    port = next((port for kind, port in _DATABASE_PORTS.items() if uri.startswith(kind)), None)
    where = host_and_port(uri, port) if port else None
    if where and (problem := connects(*where, timeout_s)):
        # Left to itself, MLflow tries a database that does not answer fifteen times, with growing pauses.
        remedy = "start the database, or correct or unset MLFLOW_TRACKING_URI"
        return Finding("MLflow", "fail", f"{shown}: {problem}", remedy)
    return Finding("MLflow", "warn", f"{shown} was not checked", "see that this store can be reached from all nodes")


def _check_server(address: str, shown: str, timeout_s: float) -> Finding:
    # A login is for the pages; whether the server is up can be asked without one.
    status, reason = answers(f"{address.rstrip('/')}/health", timeout_s)
    if status == 200:
        return Finding("MLflow", "ok", f"{shown} is healthy")
    said = f"HTTP {status} {reason}" if status else reason
    remedy = "start the server (`mlflow server`), correct MLFLOW_TRACKING_URI, or unset it to use the workspace"
    # A server behind a login may hide /health and still work.
    return Finding("MLflow", "warn" if status in (401, 403, 404) else "fail", f"{shown} /health: {said}", remedy)


class RetryingMlflow:
    """The `mlflow` module, except that the clients it makes retry their calls while the store is unavailable.

    Attributes:
        where: The URI of the store, without a login.
    """

    def __init__(self, mlflow: Any, uri: str, registry_uri: str, limit_s: float) -> None:
        self._mlflow, self._uri, self._registry_uri, self._limit_s = mlflow, uri, registry_uri, limit_s
        self.where = redacted(uri)

    def MlflowClient(self) -> Any:  # noqa: N802, the name that the module has
        """A client whose calls are retried."""
        return self.retrying(self.client_without_retries())

    def client_without_retries(self) -> Any:
        """A client whose calls fail at once, as MLflow's own do."""
        return self._mlflow.MlflowClient(self._uri, self._registry_uri)

    def retrying(self, target: Target) -> Target:
        """`target` with every method call retried as a whole."""
        return retrying(target, self.where, self._limit_s)

    def retry(self, call: Callable[[], Result]) -> Result:
        """`call()`, retried."""
        return retry(call, self.where, self._limit_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mlflow, name)


def connect(workspace: Path) -> RetryingMlflow:
    """Import `mlflow`, point it to the workspace's store, and silence it.

    Raises:
        WorkspaceError: The store cannot be reached or written.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri(workspace)
    # A server is asked below, with a time-out of its own.
    if os.environ.get("MLFLOW_TRACKING_URI") and not uri.startswith(("http://", "https://")):
        found = check_store(uri, _ANSWER_S)
        if found.status == "fail":
            raise WorkspaceError(f"{found.detail}; {found.remedy}")
    import mlflow

    registry_uri = os.environ.get("MLFLOW_REGISTRY_URI") or uri
    # Logging and loading models goes past the client, to the module's own URIs.
    with _environment_kept():
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(registry_uri)
    for name in ("mlflow", "alembic", "mlflow.tracking", "mlflow.store.db.utils", "mlflow.models"):
        logging.getLogger(name).setLevel(logging.ERROR)
    connected = RetryingMlflow(mlflow, uri, registry_uri, retry_limit_s())
    where = connected.where
    is_own = uri == own_database(workspace)
    try:
        if is_own:
            ready_database(workspace)
        connected.client_without_retries().search_experiments(max_results=1)
    except Exception as error:  # SQLAlchemy, requests and MLflow raise unrelated types
        why = unavailable_reason(error) or redacted(one_line(error))
        remedy = "start the server, or correct or unset MLFLOW_TRACKING_URI"
        if is_own:
            remedy = (
                "run again later"
                if unavailable_reason(error)
                else f"if it is broken, move {workspace / DATABASE} away and run again: the stages' artifacts stay"
            )
        refused = None if is_own else refusal(error, where)
        raise refused or WorkspaceError(f"MLflow at {where} cannot be used: {why}; {remedy}") from error
    return connected


def ready_database(workspace: Path) -> None:
    """Create the database of a workspace, whole or not at all, or let one that was moved or copied know where it is.

    MLflow stores the absolute places of all files. After a move new versions would go to the old workspace.
    """
    file = make_once(workspace / DATABASE, _create_database)
    place, suffix = own_files(workspace), f"/{Path(own_files(workspace)).name}"
    # Most of the time nothing is to be written, which must be possible where nothing can be.
    with closing(sqlite3.connect(file, timeout=_BUSY_S)) as database, database:
        others = [
            found
            for (found,) in database.execute("SELECT DISTINCT artifact_location FROM experiments")
            if found and found.endswith(suffix) and found != place
        ]
        for other in others:
            for table, column in _PLACES:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (place, len(other) + 1, other, len(other) + 1, f"{other}/"),
                )


def _create_database(file: Path) -> None:
    """Create a database with MLflow's tables. It takes seconds, and of two processes that do it at once one fails."""
    import mlflow

    mlflow.MlflowClient(f"sqlite:///{file.resolve()}").search_experiments(max_results=1)


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


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo that MLflow writes its addresses into the environment, where they would pass for the user's own."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(kept)
