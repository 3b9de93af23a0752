"""The MLflow model registry: registered versions, their files, and the aliases that say which of them is in use.

A version is sealed when it is registered: the digests of all its files lie with them, and the digest of that list is a tag of
the version. Whatever fetches a version's files compares all of them.

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
from kasa.files import (
    FOLDER_SEAL,
    check_digests,
    check_sealed_folder,
    file_digest,
    file_digests,
    remove_folder,
    seal_folder,
)
from pipeline.core.console import console
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
# The digest of the list of all digests of a version's files.
SEAL_TAG = "kasa.seal"
# MLflow adds it to what it downloads.
_ADDED = "registered_model_meta"


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

        Raises:
            ModelError: What was stored is not what was handed over.
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
            seal = self._seal(info.model_uri, info.model_id, package)
            made = mlflow.register_model(info.model_uri, name, tags={**tags, SEAL_TAG: seal})
        return _as_version(made)

    def _seal(self, uri: str, model_id: str, package: ModelPackage) -> str:
        """Read back what was logged, compare it with what was handed over, and seal it; the digest of the list of digests."""
        with tempfile.TemporaryDirectory(prefix="kasa-model-") as folder:
            files = Path(self._mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
            for source in package.artifacts.values():
                stored = files / "artifacts" / source.name
                given = (file for file in source.rglob("*") if file.is_file())
                try:
                    check_digests(stored, file_digests(source, given))
                    check_sealed_folder(stored)  # where it was made, if it was sealed there
                except DamagedFileError as error:
                    raise ModelError(f"MLflow at {self.where} stored something else: {error}; run again") from None
            (files / _ADDED).unlink(missing_ok=True)
            seal_folder(files)
            self.client.log_model_artifact(model_id, str(files / FOLDER_SEAL))
            return file_digest(files / FOLDER_SEAL)

    def fetch_adapter(self, uri: str, folder: Path) -> Path:
        """The adapter of a version in `folder`: fetched from the registry, unless a sound copy is there already.

        Raises:
            ModelError: There is no such version, or its files in the registry are damaged.
        """

        def fetch(new: Path) -> None:
            # What a kill leaves has a name that the next attempt cleans up.
            with tempfile.TemporaryDirectory(
                dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"
            ) as scratch:
                os.replace(self._fetch(self.look_up(uri), Path(scratch)) / "artifacts" / ADAPTER, new)

        try:
            check_sealed_folder(make_once(folder, fetch))
        except DamagedFileError:
            remove_folder(folder)
            make_once(folder, fetch)
        return folder

    def check_files(self, version: ModelVersion) -> None:
        """Fetch a version, and compare its files with what they were when it was registered.

        Raises:
            ModelError: It cannot be fetched, or it is damaged. A version that this pipeline did not register is not looked at.
        """
        if KEY_TAG in version.tags:
            with tempfile.TemporaryDirectory(prefix="kasa-model-") as folder:
                self.fetch_files(version.uri, Path(folder))

    def fetch_files(self, uri: str, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Download the files of a registered model into `folder`.

        Returns:
            The folder in which they lie, and the configuration that the model was registered with.

        Raises:
            ModelError: There is no such model, it cannot be downloaded, or it is damaged.
        """
        from mlflow.exceptions import MlflowException

        files = self._fetch(self.look_up(uri), folder)
        try:  # a version that carries no seal may be damaged here
            flavors = self._mlflow.models.Model.load(str(files)).flavors
        except (MlflowException, OSError) as error:
            raise ModelError(f"{uri}: its MLmodel in {self.where} cannot be read: {one_line(error)}") from error
        return files, dict(flavors.get("python_function", {}).get("config") or {})

    def _fetch(self, version: ModelVersion, folder: Path) -> Path:
        """Download a version into `folder` and compare its files with what they were when it was registered."""
        from mlflow.exceptions import MlflowException

        try:
            files = Path(self._mlflow.artifacts.download_artifacts(artifact_uri=version.uri, dst_path=str(folder)))
        except (MlflowException, OSError) as error:
            raise ModelError(f"{version.uri} cannot be fetched from {self.where}: {one_line(error)}") from error
        try:
            if seal := version.tags.get(SEAL_TAG):
                check_sealed_folder(files, must_be_sealed=True)
                check_digests(files, {FOLDER_SEAL: seal})
                return files
            check_sealed_folder(files / "artifacts" / ADAPTER)
        except DamagedFileError as error:
            what = str(error).removeprefix(f"{files}/")
            raise ModelError(
                f"{version.uri} is damaged in the registry: {what}; put that file back from a backup, register the "
                f"adapter anew (`kasa run RECIPE --force register`), or take another version (`kasa models {version.name}`)"
            ) from None
        if KEY_TAG in version.tags:
            console.print(
                f"{version.uri} has no tag {SEAL_TAG}: of its files only the adapter was compared", soft_wrap=True
            )
        return files

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
