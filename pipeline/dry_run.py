"""`--dry-run`: what a run would do, found out without making, fetching or starting anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kasa import Target, check_rank, find_targets
from pipeline import keys
from pipeline.artifacts import ArtifactStore, StageKey
from pipeline.base_model import BaseModel, find_base
from pipeline.deepspeed_config import (
    offloads_optimizer,
    offloads_parameters,
    zero_stage,
)
from pipeline.model_shapes import meta_model, model_config
from pipeline.plan import Estimate, estimate
from pipeline.prepare.sources import resolve_sources
from pipeline.prepare.stage import load_prepared
from pipeline.recipe import Recipe
from pipeline.stages.train import deepspeed_settings
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
    targets = find_targets(model, recipe.adapter.targets) if model is not None else []
    check_rank(targets, recipe.adapter.rank, "adapter.rank")
    check_rank(targets, recipe.spectra_rank, "spectra.rank")
    deepspeed = deepspeed_settings(recipe)
    stages = _stages(recipe, base, sources.digest if sources else None, targets)
    return RunPlan(
        recipe=recipe,
        stages=stages,
        estimate=estimate(
            recipe,
            model,
            [(target.name, target.out_features, target.in_features) for target in targets],
            zero_stage=zero_stage(deepspeed),
            offload=offloads_optimizer(deepspeed),
            train_rows=_train_rows(recipe, stages),
            offload_weights=offloads_parameters(deepspeed),
        ),
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


def _train_rows(recipe: Recipe, stages: tuple[StagePlan, ...]) -> int | None:
    """Rows of the training split: from the prepared data if it is there, else the recipe's limit."""
    prepared = stages[keys.STAGES.index(keys.PREPARE)]
    if prepared.action == "reuse":
        folder = Path(recipe.workspace) / "artifacts" / keys.PREPARE / str(prepared.key)
        return int(load_prepared(folder).summary["train_rows"])
    return recipe.data.train_rows
