"""What artifacts there are, why one was made although others of its stage were there, and which nothing needs any more.

The reasons are a pure comparison of ingredients.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kasa.errors import DamagedFileError
from kasa.files import remove_folder
from pipeline.registry.store import Registry
from pipeline.run.graph import STAGE_OF_INPUT, STAGES
from pipeline.storage.artifacts import ArtifactStore, StageKey, is_held, read_manifest
from pipeline.storage.mirror import MANIFEST
from pipeline.tracking.server import has_store

Ingredients = Mapping[str, Any]

_MODULES_NAMED = 4


@dataclass(frozen=True)
class Stored:
    """A complete artifact as it lies in the store.

    Attributes:
        made, used: when it was made, and last made or reused.
        ingredients: what its key was made of.
    """

    stage: str
    key: str
    folder: Path
    made: datetime
    used: datetime
    ingredients: Ingredients
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """`STAGE/KEY`."""
        return f"{self.stage}/{self.key}"

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    @property
    def inputs(self) -> Iterator[str]:
        """`STAGE/KEY` of the artifacts it was made from."""
        for name, value in self.ingredients["inputs"].items():
            if name in STAGE_OF_INPUT and value:
                yield f"{STAGE_OF_INPUT[name]}/{value}"


def ingredients_by_name(stored: Iterable[Stored]) -> dict[str, Ingredients]:
    """The ingredients by `STAGE/KEY`."""
    return {one.name: one.ingredients for one in stored}


def of_recipe(stored: Iterable[Stored], name: str) -> set[str]:
    """Those that runs of a recipe of this name have made, by `STAGE/KEY`; what does not say who made it is among them."""
    return {one.name for one in stored if one.facts.get("recipe", name) == name}


def stored_artifacts(store: ArtifactStore, stages: Sequence[str] = STAGES) -> list[Stored]:
    """All complete artifacts of the stages, in the order of the stages and then of their making; damaged ones are left out."""
    found = []
    for stage in stages:
        of_stage = [
            _read(manifest) for manifest in (store.root / stage).glob(f"*/{MANIFEST}") if _is_complete(manifest)
        ]
        found += sorted((one for one in of_stage if one), key=lambda one: one.made)
    return found


def _is_complete(manifest: Path) -> bool:
    return manifest.parent.suffix not in (".partial", ".old")


def _read(manifest: Path) -> Stored | None:
    try:
        values = read_manifest(manifest.parent)
        made = datetime.fromisoformat(values["made"])
        used = datetime.fromtimestamp(manifest.stat().st_mtime, UTC)
        folder = manifest.parent
        return Stored(folder.parent.name, folder.name, folder, made, used, values["ingredients"], values["facts"])
    except (OSError, DamagedFileError):
        return None


def why_made(key: StageKey, known: Mapping[str, Ingredients], among: Collection[str] | None = None) -> list[str]:
    """What differs from the most similar artifact of the same stage, in words; empty where there is no other.

    Where an input is another stage's artifact, what differs there is said instead.

    Args:
        known: the ingredients of artifacts by `STAGE/KEY`, older ones first.
        among: those of them that it is compared with: the ones of the same recipe, since another one has its own reasons.
            None: all.
    """
    others = [
        ingredients
        for name, ingredients in known.items()
        if name.startswith(f"{key.stage}/")
        and (among is None or name in among)
        and ingredients != key.ingredients
        and _given(ingredients) == _given(key.ingredients)  # the plain base's evaluation is no other adapter's
    ]
    if not others:
        return []
    nearest = min(reversed(others), key=lambda ingredients: len(_differences(ingredients, key.ingredients)))
    return list(dict.fromkeys(_in_words(nearest, key.ingredients, known)))


def _given(ingredients: Ingredients) -> set[str]:
    return {name for name, value in ingredients.get("inputs", {}).items() if value}


def _in_words(old: Ingredients, new: Ingredients, known: Mapping[str, Ingredients]) -> Iterator[str]:
    differences = _differences(old, new)
    if modules := [".".join(path) for section, *path in differences if section == "code"]:
        # After a release it may be most of them, and MLflow's tags hold 5,000 characters.
        more = f" and {len(modules) - _MODULES_NAMED} more" if len(modules) > _MODULES_NAMED else ""
        yield f"the code of {', '.join(modules[:_MODULES_NAMED])}{more} changed"
    for (section, *path), (before, after) in differences.items():
        name = ".".join(path)
        if section == "code":
            continue
        if section != "inputs":
            yield f"{name} {before} -> {after}"
        elif name in STAGE_OF_INPUT:
            stage = STAGE_OF_INPUT[name]
            made_from = [known[name] for name in (f"{stage}/{before}", f"{stage}/{after}") if name in known]
            if len(made_from) == 2:
                yield from _in_words(made_from[0], made_from[1], known)
            else:
                yield f"{stage} {before} -> {after}"
        else:
            yield f"the {name} changed"


def _differences(old: Ingredients, new: Ingredients) -> dict[tuple[str, ...], tuple[Any, Any]]:
    before, after = dict(_flat(old)), dict(_flat(new))
    return {path: (before.get(path), after.get(path)) for path in before | after if before.get(path) != after.get(path)}


def _flat(values: Ingredients, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


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
    """Remove what was planned, except what a run at work has found, made, or is making; returns what went."""
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
        # Whoever begins to use it meanwhile needs this lock.
        with FileLock(folder.with_name(f"{removal.key}.lock"), timeout=0):
            if is_held(folder):
                return False
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
    """What interrupted work left, and folders that are no artifacts because their manifests are missing or damaged."""
    for path in sorted(path for path in store.root.glob("*/*") if path.is_dir()):
        if not _is_complete(path / MANIFEST) or _read(path / MANIFEST) is None:
            yield path


def _changed(folder: Path) -> datetime:
    newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    return datetime.fromtimestamp(newest, UTC)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
