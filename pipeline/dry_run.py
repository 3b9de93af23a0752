"""`--dry-run`: what a run would do, found out without making, fetching or starting anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kasa.targets import Target
from pipeline import keys
from pipeline.artifacts import ArtifactStore, StageKey
from pipeline.base_model import BaseModel, find_base
from pipeline.model_shapes import meta_model, model_config
from pipeline.plan import DataFacts, Estimate, checked_targets, estimate
from pipeline.prepare.sources import resolve_sources
from pipeline.prepare.stage import load_prepared
from pipeline.recipe import Recipe
from pipeline.tracking import tracking_uri


@dataclass(frozen=True)
class StagePlan:
    """What would become of a stage: `reuse` or `make`; the key is None where an input is not fetched yet."""

    name: str
    action: str
    key: str | None


@dataclass(frozen=True)
class RunPlan:
    """A resolved recipe with what it comes to.

    Attributes:
        fetches: what would be fetched first.
    """

    recipe: Recipe
    stages: tuple[StagePlan, ...]
    estimate: Estimate
    fetches: tuple[str, ...]


def plan_run(recipe: Recipe) -> RunPlan:
    """Plan a run.

    Raises:
        KasaError: what the run itself would refuse, as far as it can be seen from here.
    """
    sources = resolve_sources(recipe.data, recipe.workspace, fetch=False)
    base = find_base(recipe.base, recipe.workspace, fetch=False)
    config = model_config(recipe.base.model, recipe.base.revision, base.folder if base else None)
    model = meta_model(config) if config is not None else None
    targets = checked_targets(recipe, model) if model is not None else []
    stages = _stages(recipe, base, sources.digest if sources else None, targets)
    return RunPlan(
        recipe=recipe,
        stages=stages,
        estimate=estimate(recipe, model, targets, data=_data_facts(recipe, stages)),
        fetches=tuple(
            name
            for name, found in ((recipe.base.model, base), (", ".join(recipe.data.train), sources))
            if found is None
        ),
    )


def _stages(
    recipe: Recipe, base: BaseModel | None, sources_digest: str | None, targets: list[Target]
) -> tuple[StagePlan, ...]:
    """Each stage's key, as far as it is known, and whether its artifact is there."""
    known: dict[str, StageKey] = {}
    if base is not None and sources_digest is not None:
        prepared = known[keys.PREPARE] = keys.prepare_key(recipe, sources_digest, base.digest)
        spectra = known[keys.SPECTRA] = keys.spectra_key(recipe, base.digest, targets, prepared.key)
        known[keys.AUDIT] = keys.audit_key(recipe, prepared.key, spectra.key)
        trained = known[keys.TRAIN] = keys.train_key(recipe, prepared.key, spectra.key)
        measured = known[keys.EVALUATE] = keys.evaluation_key(recipe, prepared.key, base.digest, trained.key)
        registry = tracking_uri(recipe.workspace)
        known[keys.REGISTER] = keys.register_key(recipe, trained.key, measured.key, registry)
    store = ArtifactStore(recipe.workspace)
    return tuple(
        StagePlan(name, ("reuse" if store.find(known[name]) else "make"), known[name].key)
        if name in known
        else StagePlan(name, "make", None)
        for name in keys.STAGES
    )


def _data_facts(recipe: Recipe, stages: tuple[StagePlan, ...]) -> DataFacts | None:
    """The training split, if it is prepared already."""
    prepared = stages[keys.STAGES.index(keys.PREPARE)]
    if prepared.action != "reuse":
        return None
    summary = load_prepared(Path(recipe.workspace) / "artifacts" / keys.PREPARE / str(prepared.key)).summary
    rows = int(summary["train_rows"])
    return DataFacts(rows, summary["train_tokens"] / rows, int(summary["longest_tokens"]))
