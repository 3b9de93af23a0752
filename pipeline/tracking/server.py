"""Waiting for a tracking server that is away: which errors mean that, and calls that are tried again until it is back.

Everything the driver asks of MLflow goes through `patient`; only what must not wait (metrics during training, the end of
a run that failed) does not, and then decides with `absence` itself.

Which MLflow store a workspace uses, and the connection to it.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import requests

from pipeline.core.console import console
from pipeline.core.errors import TrackingAwayError, WorkspaceError

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


# MLflow tries a request eight times, for minutes, in silence, and may so make a run twice; here `pipeline.tracking.server`
# decides when to try again. What the user has set stays.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # The pages of a laptop must not call home, and there may be no network at all.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(workspace: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else a SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or own_database(workspace)


def own_database(workspace: Path) -> str:
    """The SQLite file in the workspace."""
    return f"sqlite:///{workspace.resolve() / 'mlflow.db'}"


def has_store(workspace: Path) -> bool:
    """Whether there is a store to read: a server is named, or a run has made the workspace's database."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (workspace / "mlflow.db").exists()


def ui_command(workspace: Path, mlflow: str) -> str:
    """The shell command that opens MLflow's pages on this workspace; `mlflow` is how to call MLflow."""
    uri = tracking_uri(workspace)
    return f"{mlflow} ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else f"open {uri}"


class PatientMlflow:
    """The `mlflow` module, but that the clients it makes wait for a store that is away.

    Attributes:
        where: the store's URI, without a password.
    """

    def __init__(self, mlflow: Any, uri: str, registry_uri: str, patience: float) -> None:
        self._mlflow, self._uri, self._registry_uri, self._patience = mlflow, uri, registry_uri, patience
        self.where = _without_password(uri)

    def MlflowClient(self) -> Any:  # noqa: N802, the name that the module has
        """A client whose calls are tried again until the store is back (`patience.keep_trying`)."""
        return self.waiting(self.client_at_once())

    def client_at_once(self) -> Any:
        """A client whose calls fail at once, as MLflow's own do."""
        return self._mlflow.MlflowClient(self._uri, self._registry_uri)

    def waiting(self, target: Target) -> Target:
        """`target` with methods that are each tried again, as a whole, until the store is back."""
        return patient(target, self.where, self._patience)

    def keep_trying(self, call: Callable[[], Result]) -> Result:
        """`call()`, tried again until the store is back."""
        return keep_trying(call, self.where, self._patience)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mlflow, name)


def connect(workspace: Path) -> PatientMlflow:
    """The `mlflow` module, set to the workspace's store and quiet.

    Raises:
        WorkspaceError: the store cannot be reached or written.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    uri = tracking_uri(workspace)
    registry_uri = os.environ.get("MLFLOW_REGISTRY_URI") or uri
    # For what goes past a client: logging and loading models.
    with _environment_kept():
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(registry_uri)
    for name in ("mlflow", "alembic", "mlflow.tracking", "mlflow.store.db.utils", "mlflow.models"):
        logging.getLogger(name).setLevel(logging.ERROR)
    connected = PatientMlflow(mlflow, uri, registry_uri, patience_s())
    where = connected.where
    try:
        connected.client_at_once().search_experiments(max_results=1)  # creates the database where it is missing
    except Exception as error:  # SQLAlchemy, requests and MLflow raise unrelated types
        why = absence(error) or str(error).splitlines()[0]
        raise WorkspaceError(
            f"MLflow at {where} cannot be used: {why}; start the server, or correct or unset MLFLOW_TRACKING_URI"
            if os.environ.get("MLFLOW_TRACKING_URI")
            else f"MLflow at {where} cannot be used: {why}"
        ) from error
    return connected


@contextmanager
def _environment_kept() -> Iterator[None]:
    """MLflow writes its addresses into the environment, where they would pass for the user's own."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(kept)


def _without_password(uri: str) -> str:
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", uri)
