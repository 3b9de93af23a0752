"""The model registry: versions and the models behind them. What moves aliases is in `pipeline.registry.alias_changes`."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kasa.errors import nearest
from pipeline.core.errors import ModelError
from pipeline.tracking.server import connect, has_store, tracking_uri

SCHEME = "models:/"
CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
# What MLflow's databases hold of a version's description.
_DESCRIPTION_LENGTH = 5000


@dataclass(frozen=True)
class ModelVersion:
    """A version in the registry, with the tags it was given and when it was made (UTC)."""

    name: str
    version: str
    tags: dict[str, str]
    description: str = ""
    created: datetime | None = None

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"{SCHEME}{self.name}/{self.version}"


@dataclass(frozen=True)
class ModelPackage:
    """What a version is made of.

    Attributes:
        code: the file that MLflow runs to load the model.
        packages: folders of Python packages that this file imports and that are in no package index.
        artifacts: name -> a folder that goes along.
        config: what `code` is told, JSON values.
        requirements: pip requirements.
        example: a prompt.
    """

    code: Path
    packages: Sequence[Path]
    artifacts: Mapping[str, Path]
    config: Mapping[str, Any]
    requirements: Sequence[str]
    example: str


class Registry:
    """A connection to the registry of one workspace."""

    def __init__(self, workspace: Path) -> None:
        """Connect.

        Raises:
            WorkspaceError: the store cannot be reached or written.
        """
        self.uri = tracking_uri(workspace)
        self._mlflow = connect(workspace)
        self.client = self._mlflow.MlflowClient()

    def names(self) -> list[str]:
        """The registered models that have a version."""
        return sorted({version.name for version in self._search("")})

    def versions(self, name: str) -> list[ModelVersion]:
        """A model's versions, newest first; empty where there is no such model."""
        return sorted(self._search(f"name = '{name}'"), key=lambda version: -int(version.version))

    def aliases(self, name: str) -> dict[str, str]:
        """Alias -> version; empty where there is no such model."""
        model = self.registered_model(name)
        return {alias: str(version) for alias, version in model.aliases.items()} if model else {}

    def registered_model(self, name: str) -> Any | None:
        """MLflow's record of a model as a whole; None where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(name)
        except MlflowException:
            return None

    def aliased_versions(self) -> list[ModelVersion]:
        """Every version that carries an alias."""
        return [
            version
            for name in self.names()
            for number in sorted(set(self.aliases(name).values()))
            if (version := self.version(name, number))
        ]

    def version(self, name: str, version: str) -> ModelVersion | None:
        """A version, if there is one of that number."""
        from mlflow.exceptions import MlflowException

        try:
            return _as_version(self.client.get_model_version(name, version))
        except MlflowException:
            return None

    def champion(self, name: str) -> ModelVersion | None:
        """The version that carries the alias `champion`."""
        number = self.aliases(name).get(CHAMPION)
        return self.version(name, number) if number else None

    def find(self, name: str, tags: Mapping[str, str]) -> ModelVersion | None:
        """The newest version that carries these tags."""
        return next((version for version in self.versions(name) if tags.items() <= version.tags.items()), None)

    def look_up(self, uri: str) -> ModelVersion:
        """The version behind `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

        Raises:
            ModelError: it is no such URI, or there is no such model, version or alias; with the nearest name.
        """
        name, alias, number = _parts(uri)
        self.check_name(name)
        aliases = self.aliases(name)
        number = aliases.get(alias, "") if alias else number
        if alias and not number:
            hint = nearest(alias, aliases) or f"; it has {', '.join(sorted(aliases)) or 'none'}"
            raise ModelError(f"{name} has no alias {alias}{hint}")
        found = self.version(name, number)
        if found is None:
            there = ", ".join(version.version for version in self.versions(name)[:10])
            raise ModelError(f"{name} has no version {number}; the newest are {there}")
        return found

    def check_name(self, name: str) -> None:
        """Make sure that there is such a model.

        Raises:
            ModelError: there is none; with the nearest name.
        """
        names = self.names()
        if name not in names:
            hint = nearest(name, names) or (f"; there is {', '.join(names[:10])}" if names else "; it is empty")
            raise ModelError(f"the registry at {self.uri} has no model {name}{hint}")

    def tag_version(self, model: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self.client.set_model_version_tag(model.name, model.version, key, value)

    def describe(self, model: ModelVersion, text: str) -> None:
        """Set a version's description, Markdown."""
        short = text if len(text) <= _DESCRIPTION_LENGTH else text[: _DESCRIPTION_LENGTH - 1] + "…"
        self.client.update_model_version(model.name, model.version, short)

    def register(self, run_id: str, name: str, package: ModelPackage, tags: Mapping[str, str]) -> ModelVersion:
        """Log a model from code (no pickle) under `run_id` and register it as the next version of `name`.

        The version has its tags from its first moment. Where one has them all already, the answer to an earlier try was
        lost, and that version is it.
        """
        if known := self.find(name, tags):
            return known
        mlflow = self._mlflow
        # MLflow announces new versions on stderr, in the middle of the progress bars.
        with mlflow.start_run(run_id=run_id), redirect_stderr(io.StringIO()):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(package.code),
                code_paths=[str(folder) for folder in package.packages] or None,
                artifacts={name: str(folder) for name, folder in package.artifacts.items()},
                model_config=dict(package.config),
                # The signature is that of the type hints in `code`.
                input_example=[package.example],
                pip_requirements=list(package.requirements),
            )
            made = mlflow.register_model(info.model_uri, name, tags=dict(tags))
        return _as_version(made)

    def download(self, uri: str, folder: Path) -> Path:
        """Fetch a registered model's files, or those below `URI/PATH`, into `folder`, once."""
        if not folder.exists():
            temporary = folder.with_name(f"{folder.name}.{os.getpid()}.new")
            temporary.mkdir(parents=True, exist_ok=True)
            fetched = self._mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(temporary))
            try:
                os.replace(fetched, folder)
            except OSError:
                if not folder.exists():  # another run may have been first
                    raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return folder

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

    def _search(self, wanted: str) -> list[ModelVersion]:
        found, token = [], None
        while True:
            page = self.client.search_model_versions(wanted, max_results=1000, page_token=token)
            found += [_as_version(version) for version in page]
            token = page.token
            if not token:
                return found


def open_registry(workspace: Path) -> Registry:
    """The registry of finished runs, to read models from.

    Raises:
        ModelError: the workspace has none.
    """
    if not has_store(workspace):
        raise ModelError(
            f"{workspace} holds no MLflow database; name the workspace of the run with --workspace, "
            "or the server with MLFLOW_TRACKING_URI"
        )
    return Registry(workspace)


def _as_version(found: Any) -> ModelVersion:
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return ModelVersion(found.name, str(found.version), dict(found.tags), found.description or "", created)


def _parts(uri: str) -> tuple[str, str, str]:
    """(name, alias, version) of a registry URI; alias or version is empty."""
    rest = uri.removeprefix(SCHEME)
    name, at, alias = rest.partition("@")
    if not at:
        name, _, number = rest.partition("/")
    if rest == uri or not name or "/" in name or not (alias if at else number.isdigit()):
        raise ModelError(f"{uri} names no version; write {SCHEME}NAME/3 or {SCHEME}NAME@challenger")
    return name, alias, "" if at else str(int(number))
