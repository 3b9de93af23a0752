"""What artifacts there are, and why one was made although others of its stage were there: pure comparison of ingredients."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.artifacts.store import ArtifactStore, StageKey
from pipeline.run.graph import STAGE_OF_INPUT, STAGES
from pipeline.storage.mirror import MANIFEST

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
        values = json.loads(manifest.read_text(encoding="utf-8"))
        made = datetime.fromisoformat(values["made"])
        used = datetime.fromtimestamp(manifest.stat().st_mtime, UTC)
        folder = manifest.parent
        return Stored(folder.parent.name, folder.name, folder, made, used, values["ingredients"], values["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def why_made(key: StageKey, known: Mapping[str, Ingredients]) -> list[str]:
    """What differs from the most similar artifact of the same stage, in words; empty where there is no other.

    Where an input is another stage's artifact, what differs there is said instead.

    Args:
        known: the ingredients of artifacts by `STAGE/KEY`, older ones first.
    """
    others = [
        ingredients
        for name, ingredients in known.items()
        if name.startswith(f"{key.stage}/")
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
