"""The MLflow model registry: registered versions, their files, and the aliases that say which of them is in use.

`champion` is the version in use, `previous` the champion before it, `challenger` the newest version that was not promoted.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kasa.errors import DamagedFileError, nearest
from kasa.files import check_sealed_folder, remove_folder
from pipeline.core.errors import ModelError, one_line
from pipeline.core.files import ADAPTER, make_once
from pipeline.tracking.availability import if_there
from pipeline.tracking.server import connect, has_store

SCHEME = "models:/"
CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
# The longest description of a version that MLflow's databases hold.
_DESCRIPTION_LENGTH = 5000

# Tells the versions that this pipeline registered, and which artifact each of them is.
KEY_TAG = "kasa.register_key"


@dataclass(frozen=True)
class ModelVersion:
    """A registered version of a model. `created` is in UTC."""

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
    """The parts of a model to be registered.

    Attributes:
        code: The Python file that MLflow runs to load the model.
        packages: Folders of the packages that this file imports and that no package index has.
        artifacts: Name -> a folder that is stored with the model.
        config: JSON values that `code` receives.
        requirements: pip requirements.
        example: An example prompt.
        params: What a request may set beside its input, with the values where it does not.
    """

    code: Path
    packages: Sequence[Path]
    artifacts: Mapping[str, Path]
    config: Mapping[str, Any]
    requirements: Sequence[str]
    example: str
    params: Mapping[str, Any] = field(default_factory=dict)


class Registry:
    """A connection to the registry of one workspace.

    Attributes:
        where: The URI of its store, without a login.
    """

    def __init__(self, workspace: Path) -> None:
        """Connect to the registry.

        Raises:
            WorkspaceError: The store cannot be reached or written.
        """
        self._mlflow = connect(workspace)
        self.where = self._mlflow.where
        self.client = self._mlflow.MlflowClient()

    def names(self) -> list[str]:
        """The names of the registered models that have a version, sorted."""
        return sorted({version.name for version in self._search("")})

    def versions(self, name: str) -> list[ModelVersion]:
        """A model's versions, newest first; empty if there is no such model."""
        return sorted(self._search(f"name = '{name}'"), key=lambda version: -int(version.version))

    def aliases(self, name: str) -> dict[str, str]:
        """Alias -> version number of a model; empty if there is no such model."""
        model = self.registered_model(name)
        return {alias: str(version) for alias, version in model.aliases.items()} if model else {}

    def registered_model(self, name: str) -> Any | None:
        """MLflow's record of a registered model; None if there is no such model."""
        return if_there(lambda: self.client.get_registered_model(name))

    def aliased_versions(self) -> list[ModelVersion]:
        """The versions of all models that carry an alias."""
        return [
            version
            for name in self.names()
            for number in sorted(set(self.aliases(name).values()))
            if (version := self.version(name, number))
        ]

    def version(self, name: str, version: str) -> ModelVersion | None:
        """The version of this number; None if there is none."""
        found = if_there(lambda: self.client.get_model_version(name, version))
        return None if found is None else _as_version(found)

    def champion(self, name: str) -> ModelVersion | None:
        """The version that carries the alias `champion`; None if there is none."""
        number = self.aliases(name).get(CHAMPION)
        return self.version(name, number) if number else None

    def find(self, name: str, tags: Mapping[str, str]) -> ModelVersion | None:
        """The newest version that carries all these tags; None if there is none."""
        return next((version for version in self.versions(name) if tags.items() <= version.tags.items()), None)

    def look_up(self, uri: str) -> ModelVersion:
        """The version that `models:/NAME/VERSION` or `models:/NAME@ALIAS` names.

        Raises:
            ModelError: It is no such URI, or there is no such model, version or alias. The message has the nearest name.
        """
        name, alias, number = _parts(uri)
        self.check_name(name)
        aliases = self.aliases(name)
        number = aliases.get(alias, "") if alias else number
        if alias == CHAMPION and not number:
            raise ModelError(self._without_champion(name))
        if alias and not number:
            hint = nearest(alias, aliases) or f"; it has {', '.join(sorted(aliases)) or 'none'}"
            raise ModelError(f"{name} has no alias {alias}{hint}")
        found = self.version(name, number)
        if found is None:
            there = ", ".join(version.version for version in self.versions(name)[:10])
            raise ModelError(f"{name} has no version {number}; the newest are {there}")
        return found

    def _without_champion(self, name: str) -> str:
        newest = self.versions(name)[0]
        why = f"{newest.tags.get('kasa.decision', 'registered')} ({newest.tags.get('kasa.reason', 'no reason given')})"
        return (
            f"{name} has no champion: version {newest.version} was {why}; it answers as {newest.uri}, and "
            f"`kasa promote {newest.uri}` makes it the champion"
        )

    def check_name(self, name: str) -> None:
        """Make sure that there is a model of this name.

        Raises:
            ModelError: There is none. The message has the nearest name.
        """
        names = self.names()
        if name not in names:
            hint = nearest(name, names) or (f"; there is {', '.join(names[:10])}" if names else "; it is empty")
            raise ModelError(f"the registry at {self.where} has no model {name}{hint}")

    def tag_version(self, model: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self.client.set_model_version_tag(model.name, model.version, key, value)

    def describe(self, model: ModelVersion, text: str) -> None:
        """Set the description of a version, in Markdown. It is cut to the length that MLflow stores."""
        short = text if len(text) <= _DESCRIPTION_LENGTH else text[: _DESCRIPTION_LENGTH - 1] + "…"
        self.client.update_model_version(model.name, model.version, short)

    def register(self, run_id: str, name: str, package: ModelPackage, tags: Mapping[str, str]) -> ModelVersion:
        """Log a model from code (no pickle) to the run `run_id` and register it as the next version of `name`.

        The version is created together with its tags. So if a version with all these tags exists, an earlier attempt had
        succeeded and only its reply was lost: that version is returned.
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
                # The signature is that of the type hints in `code`, with the types of these values as those of the parameters.
                input_example=([package.example], dict(package.params)) if package.params else [package.example],
                pip_requirements=list(package.requirements),
            )
            made = mlflow.register_model(info.model_uri, name, tags=dict(tags))
        return _as_version(made)

    def download(self, uri: str, folder: Path) -> Path:
        """Download a registered model's files, or those below `URI/PATH`, to `folder`, unless it exists already and is sound.

        Raises:
            ModelError: The files in the registry are damaged.
        """

        def fetch(new: Path) -> None:
            # MLflow puts what it downloads into a subfolder named after the last part of the path, if there is one.
            # What a kill leaves has a name that the next attempt cleans up.
            with tempfile.TemporaryDirectory(
                dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"
            ) as scratch:
                target = Path(scratch, "files")  # not `scratch` itself, which only its owner may read
                target.mkdir()
                fetched = self._mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(target))
                os.replace(fetched, new)

        try:
            check_sealed_folder(make_once(folder, fetch))
        except DamagedFileError:
            remove_folder(folder)
            _check_whole(uri, make_once(folder, fetch))
        return folder

    def check_adapter(self, version: ModelVersion) -> None:
        """Fetch the adapter of a version, and compare its files with what they were at its training.

        Raises:
            ModelError: It cannot be fetched, or it is damaged. A version that this pipeline did not register is not looked at.
        """
        from mlflow.exceptions import MlflowException

        if KEY_TAG not in version.tags:
            return
        with tempfile.TemporaryDirectory(prefix="kasa-model-") as folder:
            uri = f"{version.uri}/artifacts/{ADAPTER}"
            try:
                files = self._mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
            except (MlflowException, OSError) as error:
                raise ModelError(f"{uri} cannot be fetched from {self.where}: {one_line(error)}") from error
            _check_whole(version.uri, Path(files))

    def fetch_files(self, uri: str, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Download the files of a registered model into `folder`.

        Returns:
            The folder in which they lie, and the configuration that the model was registered with.

        Raises:
            ModelError: There is no such model, it cannot be downloaded, or its adapter is damaged.
        """
        from mlflow.exceptions import MlflowException

        self.look_up(uri)
        try:
            files = Path(self._mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
            flavors = self._mlflow.models.Model.load(str(files)).flavors
        except (MlflowException, OSError) as error:
            raise ModelError(f"{uri} cannot be fetched from {self.where}: {one_line(error)}") from error
        _check_whole(uri, files / "artifacts" / ADAPTER)
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
    """The registry of a workspace, to read models from.

    Raises:
        ModelError: The workspace has no MLflow database and no server is named.
    """
    if not has_store(workspace):
        raise ModelError(
            f"{workspace} holds no MLflow database; name the workspace of the run with --workspace, "
            "or the server with MLFLOW_TRACKING_URI"
        )
    return Registry(workspace)


def _check_whole(uri: str, adapter: Path) -> None:
    try:
        check_sealed_folder(adapter)
    except DamagedFileError as error:
        raise ModelError(f"{uri} is damaged in the registry: {error}; use another version") from None


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
