"""Content-addressed artifacts: what a stage made, stored under a key of everything it was made from.

`WORKSPACE/artifacts/STAGE/KEY/` exists if and only if the artifact is complete: a stage works in `KEY.partial/`, which an
interrupted run leaves behind for the next one to go on from; the manifest is written last and the folder is then renamed.
A lock beside it keeps two runs from doing the same work twice.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.console import console
from pipeline.errors import WorkspaceError

MANIFEST = "manifest.json"
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class StageKey:
    """What a stage depends on, and the key made of it.

    Attributes:
        stage: the stage's name.
        ingredients: settings, input keys or digests, code digest and package versions, as JSON-ready values.
    """

    stage: str
    ingredients: dict[str, Any]

    @property
    def key(self) -> str:
        """16 hexadecimal digits of SHA-256 over the ingredients."""
        return content_digest(self.ingredients)[:16]


@dataclass(frozen=True)
class Artifact:
    """A complete artifact.

    Attributes:
        stage, key: its address.
        folder: its files.
        facts: what the stage said about it (JSON values), from the manifest.
        reused: it was there already.
    """

    stage: str
    key: str
    folder: Path
    facts: dict[str, Any]
    reused: bool


class ArtifactStore:
    """The artifacts of one workspace."""

    def __init__(self, workspace: Path) -> None:
        self.root = workspace / "artifacts"

    def find(self, key: StageKey) -> Artifact | None:
        """The artifact, if it is complete.

        Raises:
            WorkspaceError: its manifest is damaged.
        """
        folder = self._folder(key)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return Artifact(key.stage, key.key, folder, manifest["facts"], reused=True)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise WorkspaceError(f"{folder / MANIFEST} is damaged; delete {folder} and run again") from None

    def find_or_make(self, key: StageKey, make: Callable[[Path], dict[str, Any]]) -> Artifact:
        """Reuse the artifact or have `make` fill its partial folder and return the facts about it."""
        folder = self._folder(key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{key.key}.lock"), key.stage):
            if artifact := self.find(key):
                return artifact
            partial = folder.with_name(f"{key.key}.partial")
            partial.mkdir(exist_ok=True)
            facts = make(partial)
            manifest = {"stage": key.stage, "key": key.key, "facts": facts, "ingredients": key.ingredients}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(partial, folder)
        return Artifact(key.stage, key.key, folder, facts, reused=False)

    def remove(self, artifact: Artifact) -> None:
        """Forget an artifact that no longer stands for anything."""
        shutil.rmtree(artifact.folder)

    def _folder(self, key: StageKey) -> Path:
        return self.root / key.stage / key.key


@contextmanager
def _locked(path: Path, stage: str) -> Iterator[None]:
    """Hold the lock; say so if another run has it first."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE_S)
    except Timeout:
        console.print(f"{stage}: another run is making the same artifact; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def content_digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value in canonical form, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def code_digest(modules: Iterable[str]) -> str:
    """SHA-256 over the source of modules (of every module in them, for packages): a change of code is a change of key."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(name)
        origin = Path(spec.origin)
        for source in sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]:
            digest.update(source.read_bytes())
    return digest.hexdigest()


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {package: version(package) for package in packages}
