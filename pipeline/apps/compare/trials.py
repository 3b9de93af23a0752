"""The trainings that a comparison consists of, and what each leaves; found in the workspace, or made by the usual stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kasa.targets import Target
from pipeline.apps.compare.methods import BASE, ComparedMethod
from pipeline.artifacts.store import Artifact, ArtifactStore, StageKey
from pipeline.config.recipe import Recipe
from pipeline.data.sources import DataSources
from pipeline.models.base import BaseModel
from pipeline.run import graph as keys
from pipeline.run.context import RunContext
from pipeline.run.stages.audit import audit
from pipeline.run.stages.evaluate import evaluate_alone
from pipeline.run.stages.prepare import prepare
from pipeline.run.stages.spectra import spectra
from pipeline.run.stages.train import train


@dataclass(frozen=True)
class Trial:
    """One training of one method, with its evaluation; the base is evaluated only, a tuning trial trained only.

    Attributes:
        entrant: the method's name.
        recipe: complete, with seed and learning rate.
        is_tuning: whether it only helps to choose a learning rate.
    """

    entrant: str
    recipe: Recipe
    is_tuning: bool = False

    @property
    def name(self) -> str:
        """In words, unique in a comparison."""
        if self.entrant == BASE:
            return BASE
        train = self.recipe.train
        return f"{self.entrant}, {'tuning' if self.is_tuning else f'seed {train.seed}'}, rate {train.learning_rate:g}"


def trial(entrant: ComparedMethod, seed: int, rate: float, is_tuning: bool = False) -> Trial:
    """A method with a seed and a learning rate."""
    train = entrant.recipe.train.model_copy(update={"seed": seed, "learning_rate": rate})
    return Trial(entrant.name, entrant.recipe.model_copy(update={"train": train}), is_tuning)


def trial_keys(trial: Trial, base: str, sources: str, targets: Sequence[Target]) -> dict[str, StageKey]:
    """The key of each stage that the trial needs; `base` and `sources` are digests."""
    recipe = trial.recipe
    prepared = keys.prepare_key(recipe, sources, base)
    found = {keys.PREPARE: prepared}
    if trial.entrant == BASE:
        return found | {keys.EVALUATE: keys.evaluation_key(recipe, prepared.key, base, None)}
    decomposed = None
    if recipe.decomposes:
        decomposed = found[keys.SPECTRA] = keys.spectra_key(
            recipe, base, targets, prepared.key if recipe.calibrated else None
        )
        if recipe.dropped_rank:
            found[keys.AUDIT] = keys.audit_key(recipe, prepared.key, decomposed.key)
    trained = keys.train_key(recipe, prepared.key, decomposed.key if decomposed else None)
    found[keys.TRAIN] = trained
    if trial.is_tuning:
        return found
    return found | {keys.EVALUATE: keys.evaluation_key(recipe, prepared.key, base, trained.key)}


def made_already(store: ArtifactStore, wanted: Mapping[str, StageKey]) -> dict[str, Artifact]:
    """Those of the artifacts that are there."""
    found = {stage: store.find(key) for stage, key in wanted.items()}
    return {stage: artifact for stage, artifact in found.items() if artifact is not None}


def run_trial(
    context: RunContext, trial: Trial, base: BaseModel, sources: DataSources, targets: Sequence[Target]
) -> dict[str, Artifact]:
    """The artifacts of the trial's stages, by stage."""
    prepared = prepare(context, base, sources)
    made = {keys.PREPARE: prepared}
    if trial.entrant == BASE:
        return made | {keys.EVALUATE: evaluate_alone(context, base, prepared, None)}
    decomposed = None
    if trial.recipe.decomposes:
        text = prepared if trial.recipe.calibrated else None
        decomposed = made[keys.SPECTRA] = spectra(context, base, targets, text, None)
        if trial.recipe.dropped_rank:
            made[keys.AUDIT] = audit(context, base, targets, prepared, decomposed)
    trained = made[keys.TRAIN] = train(context, base, sources, targets, prepared, decomposed, None)
    if not trial.is_tuning:
        made[keys.EVALUATE] = evaluate_alone(context, base, prepared, trained)
    return made


def costs(made: Mapping[str, Artifact]) -> dict[str, Any]:
    """What a trained trial took: see `COSTS`; NaN where spectra of an earlier version do not say."""
    facts = made[keys.TRAIN].facts
    spectra_s = made[keys.SPECTRA].facts.get("seconds", math.nan) if keys.SPECTRA in made else 0.0
    return {
        "trainable_parameters": facts["trainable_parameters"],
        "start_s": spectra_s + facts["attach_s"],
        "tokens_per_second": facts["tokens_per_second"],
        "memory_gib": facts["memory_gib"],
        "adapter_mib": facts["adapter_bytes"] / 2**20,
    }


# Name -> what it is, with its unit.
COSTS = {
    "trainable_parameters": "trained parameters",
    "start_s": "s to the first step",
    "tokens_per_second": "tokens/s",
    "memory_gib": "memory, GiB",
    "adapter_mib": "adapter, MiB",
}
