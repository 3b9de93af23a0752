"""The one door to MLflow: one parent run, one child for each stage, and the model registry.

Only the driver writes. Workers leave journals, so no rank and no restart can make a second run, and a metric that is in
MLflow already is not sent again.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, WorkspaceError
from pipeline.journal import Record

CHAMPION = "champion"
_PARENT_TAG = "mlflow.parentRunId"
# What MLflow stores at most in one batch and one parameter.
_BATCH = 500
_PARAMETER_LENGTH = 500


def tracking_uri(workspace: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else a SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _own_database(workspace)


def _own_database(workspace: Path) -> str:
    return f"sqlite:///{workspace.resolve() / 'mlflow.db'}"


def ui_command(workspace: Path, mlflow: str) -> str:
    """The shell command that opens MLflow's pages on this workspace; `mlflow` is how to call MLflow."""
    uri = tracking_uri(workspace)
    return f"{mlflow} ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else f"open {uri}"


def open_registry(workspace: Path) -> Tracking:
    """The tracking store of finished runs, to read models from.

    Raises:
        ModelError: the workspace has none.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (workspace / "mlflow.db").exists():
        raise ModelError(
            f"{workspace} holds no MLflow database; name the workspace of the run with --workspace, "
            "or the server with MLFLOW_TRACKING_URI"
        )
    return Tracking(workspace)


@dataclass(frozen=True)
class ModelVersion:
    """A version in the registry, with the tags it was given."""

    name: str
    version: str
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"


class Tracking:
    """A connection to one tracking store and experiment."""

    def __init__(self, workspace: Path, experiment: str | None = None) -> None:
        """Connect, creating the database and the experiment where they are missing.

        Raises:
            WorkspaceError: the store cannot be reached or written.
        """
        # The pages of a laptop must not call home, and there may be no network at all.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import mlflow

        self.uri = tracking_uri(workspace)
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(os.environ.get("MLFLOW_REGISTRY_URI") or self.uri)
        _quiet()
        self._mlflow = mlflow
        try:
            self.client = mlflow.MlflowClient()
            self._experiment_id = self._experiment(experiment, workspace) if experiment else None
        except Exception as error:  # SQLAlchemy, requests and MLflow raise unrelated types
            raise WorkspaceError(f"MLflow at {self.uri} cannot be used: {str(error).splitlines()[0]}") from error

    def _experiment(self, name: str, workspace: Path) -> str:
        if found := self.client.get_experiment_by_name(name):
            return str(found.experiment_id)
        own = self.uri == _own_database(workspace)
        place = (workspace.resolve() / "mlartifacts").as_uri() if own else None
        return str(self.client.create_experiment(name, artifact_location=place))

    def start_run(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Create a run and return its id."""
        assert self._experiment_id is not None
        own = {**tags, "mlflow.runName": name, "mlflow.source.name": "kasa", "mlflow.user": _user()}
        if parent:
            own[_PARENT_TAG] = parent
        return str(self.client.create_run(self._experiment_id, tags=own).info.run_id)

    def resume_run(self, run_id: str) -> bool:
        """Set an interrupted run going again; False when the store no longer has it."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return False
        return True

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """`FINISHED`, `FAILED` or `KILLED`."""
        self.client.set_terminated(run_id, status)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value)

    def log_parameters(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Nested settings as flat, searchable parameters: `train.learning_rate`."""
        from mlflow.entities import Param

        flat = {key: _shortened(value) for key, value in _flatten(values)}
        known = self.client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), 100):
            self.client.log_batch(run_id, params=new[start : start + 100])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Metrics of one step."""
        self.log_metric_records(run_id, [{**metrics, "step": step}])

    def log_metric_records(self, run_id: str, records: Iterable[Record]) -> None:
        """Journal records with a `step` each, in few requests."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, int(record["step"]))
            for record in records
            for name, value in record.items()
            if name not in ("step", "steps")
        ]
        for start in range(0, len(metrics), _BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    def last_step(self, run_id: str, metric: str) -> int:
        """The newest step at which `metric` was logged; 0 when never."""
        return max((point.step for point in self.client.get_metric_history(run_id, metric)), default=0)

    def log_files(self, run_id: str, path: Path, place: str | None = None) -> None:
        """Log a file or a folder as artifacts, under the folder `place`."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), place)
        else:
            self.client.log_artifact(run_id, str(path), place)

    def log_dataset(self, run_id: str, name: str, digest: str, source: str, rows: int, context: str) -> None:
        """Record a data set as an input of the run, under the digest of its whole content."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:36],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps({"num_rows": rows}),
        )
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def champion(self, name: str) -> ModelVersion | None:
        """The version that carries the alias `champion`."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version_by_alias(name, CHAMPION)
        except MlflowException:
            return None
        return ModelVersion(name, str(found.version), dict(found.tags))

    def has_version(self, name: str, version: str) -> bool:
        """Whether the registry still has this version."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_model_version(name, version)
        except MlflowException:
            return False
        return True

    def set_alias(self, model: ModelVersion, alias: str) -> None:
        """Point an alias at a version."""
        self.client.set_registered_model_alias(model.name, alias, model.version)

    def tag_version(self, model: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self.client.set_model_version_tag(model.name, model.version, key, value)

    def register(
        self,
        run_id: str,
        name: str,
        code: Path,
        artifacts: Mapping[str, str],
        config: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> ModelVersion:
        """Log a model from code (no pickle) under `run_id` and register it as the next version of `name`."""
        import mlflow
        from mlflow.models import infer_signature

        example = ["A prompt."]
        # MLflow announces new versions on stderr, in the middle of the progress bars.
        with mlflow.start_run(run_id=run_id), redirect_stderr(io.StringIO()):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(code),
                artifacts=dict(artifacts),
                model_config=dict(config),
                signature=infer_signature(example, ["An answer."]),
                pip_requirements=[f"{package}=={version}" for package, version in config["versions"].items()],
                registered_model_name=name,
            )
        version = ModelVersion(name, str(info.registered_model_version), dict(tags))
        self.tag_version(version, tags)
        return version

    def download(self, uri: str, folder: Path) -> Path:
        """Fetch a registered model's files into `folder`, once."""
        if not folder.exists():
            temporary = folder.with_name(f"{folder.name}.new")
            temporary.mkdir(parents=True, exist_ok=True)
            self._mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(temporary))
            os.replace(temporary, folder)
        return folder

    def load_model(self, uri: str) -> Any:
        """The Python model behind a registry URI.

        Raises:
            ModelError: no such model, or it cannot be loaded.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self._mlflow.pyfunc.load_model(uri)
        except MlflowException as error:
            raise ModelError(f"{uri} cannot be loaded from {self.uri}: {str(error).splitlines()[0]}") from error

    def fetch_files(self, uri: str, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Copy the files of a registered model into `folder`; returns where they lie and the model's configuration.

        Raises:
            ModelError: no such model, or it cannot be fetched.
        """
        from mlflow.exceptions import MlflowException

        try:
            files = Path(self._mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
            flavors = self._mlflow.models.Model.load(str(files)).flavors
        except (MlflowException, OSError) as error:
            raise ModelError(f"{uri} cannot be fetched from {self.uri}: {str(error).splitlines()[0]}") from error
        return files, dict(flavors.get("python_function", {}).get("config") or {})

    @contextmanager
    def open_run(self, run_id: str) -> Iterator[None]:
        """End the run when the block ends: FINISHED, KILLED on Ctrl-C, FAILED on any other exception."""
        try:
            yield
        except KeyboardInterrupt:
            self.end_run(run_id, "KILLED")
            raise
        except BaseException:
            self.end_run(run_id, "FAILED")
            raise
        self.end_run(run_id)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _PARAMETER_LENGTH else text[: _PARAMETER_LENGTH - 1] + "…"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _quiet() -> None:
    import logging

    for name in ("mlflow", "alembic", "mlflow.tracking", "mlflow.store.db.utils", "mlflow.models"):
        logging.getLogger(name).setLevel(logging.ERROR)
