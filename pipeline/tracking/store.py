"""Which MLflow store a workspace uses, and the connection to it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import WorkspaceError
from pipeline.tracking.patience import absence, keep_trying, patience_s, patient

# MLflow tries a request eight times, for minutes, in silence, and may so make a run twice; here `pipeline.tracking.patience`
# decides when to try again. What the user has set stays.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # The pages of a laptop must not call home, and there may be no network at all.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}

Result = TypeVar("Result")
Target = TypeVar("Target")


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
