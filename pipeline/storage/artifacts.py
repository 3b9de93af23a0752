"""Content-addressed artifacts: what a stage made, stored under a key of everything it was made from.

`WORKSPACE/artifacts/STAGE/KEY/` exists if and only if the artifact is complete. A stage works in `KEY.partial/`, from which
the next run resumes after an interruption; the manifest is written last, and the folder is then renamed. A lock beside it
keeps two runs from doing the same work twice. Where the workspace is in a store, what is complete there
counts, and the folder is this machine's copy (`pipeline.storage`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kasa.files import remove_folder
from pipeline.core.console import console
from pipeline.core.errors import WorkspaceError
from pipeline.core.files import PARTIAL, content_digest
from pipeline.storage.mirror import MANIFEST
from pipeline.storage.workspace import Workspace

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
    """The artifacts of one workspace; `storage` is what lies behind its folder."""

    def __init__(self, workspace: Path, storage: Workspace | None = None) -> None:
        self.root = workspace / "artifacts"
        self._storage = storage or Workspace(workspace)

    def find(self, key: StageKey) -> Artifact | None:
        """The artifact, if it is complete.

        Raises:
            WorkspaceError: its manifest is damaged.
        """
        folder = self._folder(key)
        self._storage.fetch(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return Artifact(key.stage, key.key, folder, manifest["facts"], reused=True)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise WorkspaceError(f"{folder / MANIFEST} is damaged; delete {folder} and run again") from None

    def known(self, stage: str, key: str) -> StageKey | None:
        """The whole key of a complete artifact of which 16 digits are known."""
        if not key:
            return None
        self._storage.fetch(self.root / stage / key)
        try:
            manifest = json.loads((self.root / stage / key / MANIFEST).read_text(encoding="utf-8"))
            return StageKey(stage, manifest["ingredients"])
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def find_or_make(self, key: StageKey, make: Callable[[Path], dict[str, Any]], recompute: bool = False) -> Artifact:
        """Reuse the artifact or have `make` fill its partial folder and return the facts about it.

        With `recompute` one that is there is replaced, once the new one is complete.
        """
        folder = self._folder(key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{key.key}.lock"), key.stage):
            if not recompute and (artifact := self.find(key)):
                os.utime(folder / MANIFEST)  # pruning goes by the last use
                return artifact
            return self._make(key, make, recompute)

    def _make(self, key: StageKey, make: Callable[[Path], dict[str, Any]], recompute: bool) -> Artifact:
        folder = self._folder(key)
        with self._storage.leased(folder, partial(_say_waiting, key.stage)) as lease:
            # Another machine may have made it meanwhile.
            if not recompute and (artifact := self.find(key)):
                return artifact
            unfinished = folder.with_name(f"{key.key}{PARTIAL}")
            unfinished.mkdir(exist_ok=True)
            with self._storage.mirrored(unfinished, lease):
                facts = make(unfinished)
            manifest = {
                "stage": key.stage,
                "key": key.key,
                "made": datetime.now(UTC).isoformat(timespec="microseconds"),
                "facts": facts,
                "ingredients": key.ingredients,
            }
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
            self._storage.publish(unfinished, folder, lease)
            if folder.exists():
                remove_folder(folder)
            os.replace(unfinished, folder)
        return Artifact(key.stage, key.key, folder, facts, reused=False)

    def remove(self, artifact: Artifact) -> None:
        """Forget an artifact that no longer stands for anything."""
        self._storage.remove(artifact.folder)
        remove_folder(artifact.folder)

    def _folder(self, key: StageKey) -> Path:
        return self.root / key.stage / key.key


@contextmanager
def locked(path: Path, stage: str) -> Iterator[None]:
    """Hold the lock; say so if another run has it first."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE_S)
    except Timeout:
        _say_waiting(stage, "another run")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say_waiting(stage: str, holder: str) -> None:
    console.print(f"{stage}: the same artifact is being made by {holder}; waiting for it", soft_wrap=True)
