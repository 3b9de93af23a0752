"""The connection to MLflow: which store a workspace uses, and calls that are retried while it is unavailable.

Everything the driver asks of MLflow goes through `retry`. Two things must not wait: metrics during a training, and the end
of a run that failed. They ask `unavailable_reason` themselves.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import WorkspaceError, one_line
from pipeline.core.files import make_once
from pipeline.core.machine import TIMEOUT_S, Finding, answers, connects, host_and_port
from pipeline.core.redaction import redacted, shell_command
from pipeline.tracking.availability import Result, Target, refusal, retry, retry_limit_s, retrying, unavailable_reason

DATABASE = "mlflow.db"

_DATABASE_PORTS = {"postgres": 5432, "mysql": 3306, "mssql": 1433}
_ANSWER_S = 10.0

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


def registry_uri(workspace: Path) -> str:
    """MLFLOW_REGISTRY_URI if it is set, else the store of the runs."""
    return os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri(workspace)


def registry_identity(workspace: Path) -> str:
    """What tells the registry of a workspace from others: its address, without a login.

    Empty for the workspace's own database, which stays the same wherever the workspace is moved.
    """
    uri = registry_uri(workspace)
    return "" if uri == own_database(workspace) else redacted(uri)


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

    registry = registry_uri(workspace)
    # Logging and loading models goes past the client, to the module's own URIs.
    with _environment_kept():
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(registry)
    for name in ("mlflow", "alembic", "mlflow.tracking", "mlflow.store.db.utils", "mlflow.models"):
        logging.getLogger(name).setLevel(logging.ERROR)
    connected = RetryingMlflow(mlflow, uri, registry, retry_limit_s())
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


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo that MLflow writes its addresses into the environment, where they would pass for the user's own."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(kept)
