"""`--dry-run`: what a run would do, found out without making, fetching or starting anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kasa.targets import Target
from pipeline.apps.plan import DataFacts, Estimate, checked_targets, estimate
from pipeline.config.recipe import Recipe
from pipeline.core.errors import ModelError
from pipeline.data.prepared import load_prepared
from pipeline.data.sources import resolve_sources
from pipeline.models.base import BaseModel, find_base
from pipeline.models.paper import planned_model
from pipeline.registry.store import open_registry
from pipeline.run.dependencies import KeyInputs
from pipeline.run.graph import PREPARE, STAGES, stage_keys
from pipeline.run.lineage import Ingredients, ingredients_by_name, of_recipe, stored_artifacts, why_made
from pipeline.run.preflight import check_before_work, check_lengths
from pipeline.run.warm_start import WarmStart, decide_warm_start, starting_from
from pipeline.storage.artifacts import ArtifactStore, StageKey
from pipeline.storage.workspace import look_into
from pipeline.tracking.server import registry_identity


@dataclass(frozen=True)
class StagePlan:
    """What would become of a stage: `reuse` or `make`, and why it would be made although others of it are there.

    The key is None where an input is not fetched yet.
    """

    name: str
    action: str
    key: str | None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunPlan:
    """A resolved recipe with what it comes to.

    Attributes:
        fetches: what would be fetched first.
        refused: why the run would end at once, here and now.
        not_checked: what cannot be known before the run.
    """

    recipe: Recipe
    stages: tuple[StagePlan, ...]
    estimate: Estimate
    fetches: tuple[str, ...]
    refused: tuple[str, ...]
    not_checked: tuple[str, ...]


def plan_run(recipe: Recipe, recompute: Sequence[str] = ()) -> RunPlan:
    """Plan a run in which the stages `recompute` make their artifacts again.

    Raises:
        KasaError: what the run itself would refuse, as far as it can be seen from here.
    """
    found = check_before_work(recipe)
    sources = resolve_sources(recipe.data, recipe.workspace, fetch=False)
    base = find_base(recipe.base, recipe.workspace, fetch=False)
    if base is not None:
        base.targets(recipe.adapter.targets)  # refuses a checkpoint that does not fit its configuration
    model: Any = planned_model(recipe.base, base.folder if base else None)
    targets = checked_targets(recipe, model) if model is not None else []
    if model is not None and model.positions is not None:
        check_lengths(recipe, model.positions)
    stages = _stages(recipe, base, sources.digest if sources else None, targets, recompute)
    return RunPlan(
        recipe=recipe,
        stages=stages,
        estimate=estimate(recipe, model, targets, data=_data_facts(recipe, stages)),
        fetches=tuple(
            name
            for name, there in ((recipe.base.model, base), (", ".join(recipe.data.train), sources))
            if there is None
        ),
        refused=tuple(map(str, found.refused)),
        not_checked=tuple(found.not_checked),
    )


def _stages(
    recipe: Recipe,
    base: BaseModel | None,
    sources_digest: str | None,
    targets: list[Target],
    recompute: Sequence[str],
) -> tuple[StagePlan, ...]:
    """Each stage's key, as far as it is known, and whether its artifact is there."""
    store = ArtifactStore(recipe.workspace, look_into(recipe.location))
    known: dict[str, StageKey] = {}
    if base is not None and sources_digest is not None:
        registry = registry_identity(recipe.workspace)
        inputs = KeyInputs(recipe, base.digest, sources_digest, targets, registry, base_drops=base.drops)
        known = stage_keys(starting_from(inputs, _start(inputs), store, recompute))
    stored = stored_artifacts(store)
    own = of_recipe(stored, recipe.name)
    ingredients = ingredients_by_name(stored)
    ingredients |= {f"{key.stage}/{key.key}": key.ingredients for key in known.values()}
    return tuple(
        _stage(known[name], store, ingredients, own, name in recompute)
        if name in known
        else StagePlan(name, "make", None)
        for name in STAGES
    )


def _stage(
    key: StageKey, store: ArtifactStore, known: Mapping[str, Ingredients], own: Collection[str], recompute: bool
) -> StagePlan:
    if recompute:
        return StagePlan(key.stage, "make", key.key, ("you ask for it",))
    if store.find(key):
        return StagePlan(key.stage, "reuse", key.key)
    return StagePlan(key.stage, "make", key.key, tuple(why_made(key, known, own)))


def _start(inputs: KeyInputs) -> WarmStart | None:
    """What training would start from."""
    recipe = inputs.recipe
    if recipe.train.start == "scratch":
        return None
    try:
        champion = open_registry(recipe.workspace).champion(recipe.registered_name)
    except ModelError:  # there is no registry yet
        champion = None
    return decide_warm_start(inputs, champion).start


def _data_facts(recipe: Recipe, stages: tuple[StagePlan, ...]) -> DataFacts | None:
    """The training split, if it is prepared already."""
    prepared = stages[STAGES.index(PREPARE)]
    if prepared.action != "reuse":
        return None
    summary = load_prepared(recipe.workspace / "artifacts" / PREPARE / str(prepared.key)).summary
    rows = int(summary["train_rows"])
    return DataFacts(rows, summary["train_tokens"] / rows, int(summary["longest_tokens"]))
