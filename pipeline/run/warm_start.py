"""Where training starts: from scratch, or from the champion's adapter (`train.start: champion`).

The champion's update was learned beside its own truncation, so both are taken over together: under a rule that looks at
text, new text must not change what is dropped. Hence spectra are not computed anew, and the key of the training holds the
champion's training in the place of the spectra.

Whether a champion can be gone on from is decided by the tags of its version, which `adapter_tags` gave it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts.store import ADAPTER, ArtifactStore, StageKey
from pipeline.config.recipe import Recipe
from pipeline.core.files import content_digest
from pipeline.run import graph as keys

if TYPE_CHECKING:
    from kasa.targets import Target
    from pipeline.registry.store import ModelVersion
    from pipeline.run.context import RunContext


@dataclass(frozen=True)
class WarmStart:
    """A registered adapter to go on from.

    Attributes:
        uri: its version in the registry.
        train_key: the training that made it.
        spectra_key: the spectra it was trained beside; "" where its version does not say.
    """

    uri: str
    train_key: str
    spectra_key: str


@dataclass(frozen=True)
class WarmStartDecision:
    """Where a training begins: at `start`, or from scratch where that is None; `reason` says why, in words."""

    start: WarmStart | None
    reason: str


def decide_warm_start(
    recipe: Recipe, champion: ModelVersion | None, base_digest: str, targets: Sequence[Target], prepared: str
) -> WarmStartDecision:
    """Where a training on the prepared data of the key `prepared` begins.

    Where the champion was made by the very training that is asked for, that one's beginning is the answer: a run that is
    repeated, or was killed after the promotion, makes nothing new.
    """
    if recipe.train.start == "scratch":
        return WarmStartDecision(None, "as the recipe says")
    if champion is None:
        return WarmStartDecision(None, f"{recipe.registered_name} has no champion yet")
    tags = champion.tags
    earlier = _earlier_start(tags)
    spectra = keys.spectra_key(recipe, base_digest, targets, prepared).key
    made_by = keys.train_key(recipe, prepared, spectra, earlier.train_key if earlier else None)
    if made_by.key == tags.get("kasa.train_key"):
        return WarmStartDecision(
            earlier, f"as the champion, version {champion.version}, which this recipe and data made"
        )
    if obstacle := _obstacle(tags, adapter_tags(recipe, targets), base_digest):
        return WarmStartDecision(None, f"the champion, version {champion.version}, {obstacle}")
    start = WarmStart(champion.uri, tags["kasa.train_key"], tags.get("kasa.spectra_key", ""))
    return WarmStartDecision(start, f"the champion, version {champion.version}")


def chosen_spectra_key(
    recipe: Recipe,
    store: ArtifactStore,
    base_digest: str,
    targets: Sequence[Target],
    prepared: str | None,
    start: WarmStart | None,
) -> StageKey:
    """The spectra to train beside: new ones, those of the adapter to go on from, or, if they are gone, what it holds of them."""
    if start is None:
        return keys.spectra_key(recipe, base_digest, targets, prepared)
    own = store.known(keys.SPECTRA, start.spectra_key)
    return own or keys.inherited_spectra_key(recipe, base_digest, targets, start.train_key)


def adapter_tags(recipe: Recipe, targets: Sequence[Target]) -> dict[str, str]:
    """What an adapter and one that goes on from it must have in common, as tags of a version."""
    adapter = recipe.adapter
    return {
        "kasa.rank": str(adapter.rank),
        "kasa.alpha": f"{adapter.alpha:g}",
        "kasa.truncation": f"{adapter.truncation} {recipe.dropped_rank}",
        "kasa.targets": content_digest(sorted(target.name for target in targets))[:16],
        **({"kasa.head": recipe.base.head} if recipe.base.head != "language-model" else {}),
    }


def start_tags(start: WarmStart | None) -> dict[str, str]:
    """Which version a training went on from, as tags of the version that it made."""
    return {"kasa.start": "" if start is None else json.dumps(vars(start))}


def start_adapter(context: RunContext, start: WarmStart) -> Path:
    """The folder of the adapter to go on from, in the workspace; fetched from the registry where it is not there."""
    known = context.store.known(keys.TRAIN, start.train_key)
    if known and (trained := context.store.find(known)):
        return (trained.folder / ADAPTER).resolve()
    return context.registered_adapter(start.uri, start.train_key).resolve()


_WORDS = {
    "kasa.rank": "has another adapter.rank",
    "kasa.alpha": "has another adapter.alpha",
    "kasa.truncation": "drops another part of the base (adapter.truncation, rank)",
    "kasa.targets": "adapts other modules (adapter.targets)",
    "kasa.head": "has another base.head",
}


def _obstacle(tags: Mapping[str, str], wanted: Mapping[str, str], base_digest: str) -> str | None:
    """Why a version cannot be gone on from, if so."""
    if tags.get("kasa.base_digest") != base_digest:
        return "belongs to another base"
    for name, value in wanted.items():
        if name not in tags:
            return "does not say how its adapter is made"
        if tags[name] != value:
            numbers = "" if name == "kasa.targets" else f": {tags[name]}, not {value}"
            return f"{_WORDS[name]}{numbers}"
    return None


def _earlier_start(tags: Mapping[str, str]) -> WarmStart | None:
    return WarmStart(**json.loads(tags["kasa.start"])) if tags.get("kasa.start") else None
