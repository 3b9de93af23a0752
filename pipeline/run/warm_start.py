"""Where training starts: from scratch, or from the adapter of the registered champion (`train.start: champion`).

The champion's update was learned beside its own truncation, so a warm start takes both over: under a rule that looks at
text, new text must not change what is dropped. Hence the spectra are not computed from the new data, and the key of the
training holds the champion's training in the place of the spectra.

Whether a champion fits is decided by the tags of its version, which `adapter_tags` gave it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.recipe import Recipe
from pipeline.core.files import ADAPTER, content_digest
from pipeline.run.dependencies import KeyInputs
from pipeline.run.graph import SPECTRA, TRAIN, stage_keys
from pipeline.storage.artifacts import ArtifactStore

if TYPE_CHECKING:
    from kasa.targets import Target
    from pipeline.registry.store import ModelVersion
    from pipeline.run.context import RunContext


@dataclass(frozen=True)
class WarmStart:
    """A registered adapter to start from.

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
    """Where a training starts, and why.

    Attributes:
        start: the adapter to start from; None means from scratch.
        reason: in words.
    """

    start: WarmStart | None
    reason: str


def decide_warm_start(inputs: KeyInputs, champion: ModelVersion | None) -> WarmStartDecision:
    """Where the training of a run starts.

    Where the champion was made by the very training that is asked for, the answer is what that one started from: a run
    that is repeated, or was killed after the promotion, makes nothing new.

    Args:
        inputs: of the run, as if it started from scratch.
    """
    recipe = inputs.recipe
    if recipe.train.start == "scratch":
        return WarmStartDecision(None, "as the recipe says")
    if champion is None:
        return WarmStartDecision(None, f"{recipe.registered_name} has no champion yet")
    tags = champion.tags
    earlier = _earlier_start(tags)
    made_by = stage_keys(replace(inputs, champion=earlier.train_key if earlier else None))[TRAIN]
    if made_by.key == tags.get("kasa.train_key"):
        return WarmStartDecision(
            earlier, f"as the champion, version {champion.version}, which this recipe and data made"
        )
    if obstacle := _obstacle(tags, adapter_tags(recipe, inputs.targets), inputs.base):
        return WarmStartDecision(None, f"the champion, version {champion.version}, {obstacle}")
    start = WarmStart(champion.uri, tags["kasa.train_key"], tags.get("kasa.spectra_key", ""))
    return WarmStartDecision(start, f"the champion, version {champion.version}")


def starting_from(
    inputs: KeyInputs, start: WarmStart | None, store: ArtifactStore, recompute: Collection[str] = ()
) -> KeyInputs:
    """The inputs of a run whose training starts from `start`.

    The spectra are the ones that the adapter was trained beside. Where that artifact is gone, or the stage is asked to
    make it again, what the adapter itself holds of them takes its place.
    """
    if start is None:
        return inputs
    own = None if SPECTRA in recompute else store.known(SPECTRA, start.spectra_key)
    return replace(inputs, champion=start.train_key, taken_over={} if own is None else {SPECTRA: own})


def adapter_tags(recipe: Recipe, targets: Sequence[Target]) -> dict[str, str]:
    """What an adapter and the one it is started from must have in common, as tags of a version."""
    adapter = recipe.adapter
    return {
        "kasa.rank": str(adapter.rank),
        "kasa.alpha": f"{adapter.alpha:g}",
        "kasa.truncation": f"{adapter.truncation} {recipe.dropped_rank}",
        "kasa.targets": content_digest(sorted(target.name for target in targets))[:16],
        **({"kasa.head": recipe.base.head} if recipe.base.head != "language-model" else {}),
    }


def start_tags(start: WarmStart | None) -> dict[str, str]:
    """Which version a training started from, as tags of the version that it made."""
    return {"kasa.start": "" if start is None else json.dumps(vars(start))}


def start_adapter(context: RunContext, start: WarmStart) -> Path:
    """The folder of the adapter to start from, in the workspace; fetched from the registry where it is not there."""
    known = context.store.known(TRAIN, start.train_key)
    if known and (trained := context.store.reuse(known)):
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
    """Why no training can start from a version, if so."""
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
