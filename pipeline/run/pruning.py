"""Which artifacts nothing needs any more, and their removal."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock, Timeout

from kasa.files import remove_folder
from pipeline.artifacts.store import ArtifactStore
from pipeline.registry.store import Registry
from pipeline.run.graph import STAGES
from pipeline.run.lineage import Stored, stored_artifacts
from pipeline.tracking.server import has_store


@dataclass(frozen=True)
class Removal:
    """A folder that nothing needs: a complete artifact, or what interrupted work left.

    Attributes:
        key: of the artifact that it is, was, or was to become.
        size: bytes.
    """

    folder: Path
    key: str
    size: int

    @property
    def name(self) -> str:
        """`STAGE/FOLDER`."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def plan_pruning(workspace: Path, unused_days: float) -> list[Removal]:
    """What has not been used for so long, and is not what a model with an alias was made of.

    Raises:
        WorkspaceError: the model registry cannot be asked.
    """
    store, since = ArtifactStore(workspace), datetime.now(UTC) - timedelta(days=unused_days)
    unneeded = unneeded_artifacts(stored_artifacts(store), _of_models(workspace), since)
    leftovers = [path for path in _leftovers(store) if _changed(path) < since]
    return [Removal(one.folder, one.key, one.size) for one in unneeded] + [
        Removal(path, path.stem, _size(path)) for path in leftovers
    ]


def prune(planned: Sequence[Removal]) -> list[Removal]:
    """Remove what was planned, except what a run is using at this moment; returns what went."""
    return [removal for removal in planned if _remove(removal)]


def unneeded_artifacts(stored: Sequence[Stored], protected: Collection[str], since: datetime) -> list[Stored]:
    """Those neither used since, nor protected by name (`STAGE/KEY`), nor an input of one that is."""
    by_name = {one.name: one for one in stored}
    needed: set[str] = set()
    waiting = [one.name for one in stored if one.used >= since or one.name in protected]
    while waiting:
        name = waiting.pop()
        if name in by_name and name not in needed:
            needed.add(name)
            waiting.extend(by_name[name].inputs)
    return [one for one in stored if one.name not in needed]


def _remove(removal: Removal) -> bool:
    folder = removal.folder
    try:
        with FileLock(folder.with_name(f"{removal.key}.lock"), timeout=0):
            shutil.rmtree(folder) if folder.suffix == ".old" else remove_folder(folder)
    except Timeout:
        return False
    return True


def _of_models(workspace: Path) -> set[str]:
    """The artifacts that models with an alias were registered from."""
    if not has_store(workspace):
        return set()
    tags = [version.tags for version in Registry(workspace).aliased_versions()]
    made_of = {stage: f"kasa.{stage}_key" for stage in STAGES}
    return {f"{stage}/{of_one[tag]}" for of_one in tags for stage, tag in made_of.items() if tag in of_one}


def _leftovers(store: ArtifactStore) -> Iterator[Path]:
    yield from sorted(path for path in store.root.glob("*/*") if path.suffix in (".partial", ".old"))


def _changed(folder: Path) -> datetime:
    newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    return datetime.fromtimestamp(newest, UTC)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
