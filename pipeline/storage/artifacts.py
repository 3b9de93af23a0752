"""Content-addressed artifacts: what a stage made, stored under a key of everything it was made from.

`WORKSPACE/artifacts/STAGE/KEY/` exists if and only if the artifact is complete. A stage works in `KEY.partial/`, from which
the next run resumes after an interruption; the manifest is written last, and the folder is then renamed. A lock beside it
keeps two runs from doing the same work twice. Where the workspace is in a store, what is complete there
counts, and the folder is this machine's copy (`pipeline.storage`).

The manifest holds the digests of all files and one of itself. Before an artifact is reused every byte is read (about 0.9 GB/s
on one core; base and data, which are larger, are read in every run anyway), and what is damaged is named and made again. A run
holds what it has found or made until it ends, so that pruning leaves it alone.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kasa.errors import DamagedFileError
from kasa.files import check_digests, file_digests, read_sealed_json, remove_folder, sealed_json
from pipeline.core.console import console
from pipeline.core.errors import WorkspaceError
from pipeline.core.files import PARTIAL, content_digest
from pipeline.storage.mirror import MANIFEST, files_below
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of an artifact says: `stage`, `key`, `made`, `facts`, `ingredients`, and `files` by their digests.

    Raises:
        FileNotFoundError: there is no complete artifact.
        DamagedFileError: the manifest is not what was written.
    """
    return read_sealed_json(folder / MANIFEST)


class ArtifactStore:
    """The artifacts of one workspace; `storage` is what lies behind its folder."""

    def __init__(self, workspace: Path, storage: Workspace | None = None) -> None:
        self.root = workspace / "artifacts"
        self._storage = storage or Workspace(workspace)
        self._held: list[int] = []
        weakref.finalize(self, _close_all, self._held)

    def find(self, key: StageKey) -> Artifact | None:
        """The artifact, if it is complete and its manifest is sound, to be looked at. `reuse` is for working with it."""
        folder = self._folder(key)
        self._storage.fetch(folder)
        try:
            return Artifact(key.stage, key.key, folder, read_manifest(folder)["facts"], reused=True)
        except (FileNotFoundError, DamagedFileError):
            return None

    def known(self, stage: str, key: str) -> StageKey | None:
        """The whole key of a complete artifact of which 16 digits are known."""
        if not key:
            return None
        self._storage.fetch(self.root / stage / key)
        try:
            return StageKey(stage, read_manifest(self.root / stage / key)["ingredients"])
        except (FileNotFoundError, DamagedFileError):
            return None

    def reuse(self, key: StageKey) -> Artifact | None:
        """The artifact, if it is complete and every byte of it is as it was made; a damaged one is named and removed."""
        with self._locked(key):
            return self._reused(key)

    def check(self, path: Path) -> None:
        """Make sure, before something lasting is made of an artifact, that it is still what was found or made.

        Args:
            path: the artifact's folder, or a file or folder in it, which then is all that is looked at.

        Raises:
            WorkspaceError: it is not.
        """
        folder = next((folder for folder in (path, *path.parents) if folder.parent.parent == self.root), path)
        part = path.relative_to(folder)
        try:
            files = read_manifest(folder)["files"]
            check_digests(folder, {name: digest for name, digest in files.items() if Path(name).is_relative_to(part)})
        except (FileNotFoundError, DamagedFileError) as error:
            raise WorkspaceError(
                f"the artifact {folder.parent.name}/{folder.name} was damaged while this run was at work: {error}; run the "
                "same command again, which makes it again"
            ) from None

    def find_or_make(self, key: StageKey, make: Callable[[Path], dict[str, Any]], recompute: bool = False) -> Artifact:
        """Reuse the artifact or have `make` fill its partial folder and return the facts about it.

        With `recompute` one that is there is replaced, once the new one is complete.
        """
        with self._locked(key):
            if not recompute and (artifact := self._reused(key)):
                return artifact
            return self._make(key, make, recompute)

    def _locked(self, key: StageKey) -> AbstractContextManager[None]:
        folder = self._folder(key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return locked(folder.with_name(f"{key.key}.lock"), partial(_say_waiting, key.stage))

    def _reused(self, key: StageKey) -> Artifact | None:
        folder = self._folder(key)
        damage = self._damage(key)
        if damage and self._storage.store is not None:  # this machine's copy may be all that is damaged
            remove_folder(folder)
            damage = self._damage(key)
        if damage:
            console.print(f"{key.stage}: {damage}; the artifact is made again", markup=False, soft_wrap=True)
            self._storage.remove(folder)
            remove_folder(folder)
        artifact = self.find(key)
        if artifact:
            self._hold(folder)
            os.utime(folder / MANIFEST)  # pruning goes by the last use
        return artifact

    def _damage(self, key: StageKey) -> str | None:
        """What is wrong with an artifact; None if it is sound, or not there."""
        folder = self._folder(key)
        self._storage.fetch(folder)
        try:
            manifest = read_manifest(folder)
            if manifest["key"] != key.key:
                return f"{folder} is the artifact {manifest['key']}"
            check_digests(folder, manifest["files"])
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            return str(error)
        return None

    def _make(self, key: StageKey, make: Callable[[Path], dict[str, Any]], recompute: bool) -> Artifact:
        folder = self._folder(key)
        with self._storage.leased(folder, partial(_say_waiting, key.stage)) as lease:
            # Another machine may have made it meanwhile.
            if lease and not recompute and (artifact := self._reused(key)):
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
                "files": file_digests(unfinished, files_below(unfinished)),
            }
            (unfinished / MANIFEST).write_text(sealed_json(manifest), encoding="utf-8")
            self._storage.publish(unfinished, folder, lease)
            if folder.exists():
                remove_folder(folder)
            os.replace(unfinished, folder)
            self._hold(folder)
        return Artifact(key.stage, key.key, folder, facts, reused=False)

    def _hold(self, folder: Path) -> None:
        """Keep pruning away for as long as this store lives. A kernel releases the lock of a process that was killed."""
        manifest = os.open(folder / MANIFEST, os.O_RDONLY)
        self._held.append(manifest)
        fcntl.flock(manifest, fcntl.LOCK_SH)

    def remove(self, artifact: Artifact) -> None:
        """Forget an artifact that no longer stands for anything."""
        self._storage.remove(artifact.folder)
        remove_folder(artifact.folder)

    def _folder(self, key: StageKey) -> Path:
        return self.root / key.stage / key.key


def is_held(folder: Path) -> bool:
    """Whether a run at work has found or made this artifact."""
    try:
        with (folder / MANIFEST).open("rb") as manifest:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def locked(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock; call `on_wait` if another run has it first."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE_S)
    except Timeout:
        on_wait("another run")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say_waiting(stage: str, holder: str) -> None:
    console.print(f"{stage}: the same artifact is being made by {holder}; waiting for it", soft_wrap=True)


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)
