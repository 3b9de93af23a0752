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
from pipeline.run.dependencies import KeyInputs
from pipeline.run.work import Work, run_stages


@dataclass(frozen=True)
class Trial:
    """One training of one method, with its evaluation; the base is evaluated only, a tuning trial trained only.

    Attributes:
        method: the method's name.
        recipe: complete, with seed and learning rate.
        is_tuning: whether it only helps to choose a learning rate.
    """

    method: str
    recipe: Recipe
    is_tuning: bool = False

    @property
    def name(self) -> str:
        """In words, unique in a comparison."""
        if self.method == BASE:
            return BASE
        train = self.recipe.train
        return f"{self.method}, {'tuning' if self.is_tuning else f'seed {train.seed}'}, rate {train.learning_rate:g}"


def trial(method: ComparedMethod, seed: int, rate: float, is_tuning: bool = False) -> Trial:
    """A method with a seed and a learning rate."""
    train = method.recipe.train.model_copy(update={"seed": seed, "learning_rate": rate})
    return Trial(method.name, method.recipe.model_copy(update={"train": train}), is_tuning)


def trial_inputs(trial: Trial, base: str, sources: str, targets: Sequence[Target]) -> KeyInputs:
    """What the keys of the trial's stages are made from; `base` and `sources` are digests."""
    return KeyInputs(
        trial.recipe,
        base,
        sources,
        targets,
        until=keys.TRAIN if trial.is_tuning else keys.EVALUATE,
        trains=trial.method != BASE,
    )


def trial_keys(trial: Trial, base: str, sources: str, targets: Sequence[Target]) -> dict[str, StageKey]:
    """The key of each stage that the trial needs; `base` and `sources` are digests."""
    return keys.stage_keys(trial_inputs(trial, base, sources, targets))


def made_already(store: ArtifactStore, wanted: Mapping[str, StageKey]) -> dict[str, Artifact]:
    """Those of the artifacts that are there."""
    found = {stage: store.find(key) for stage, key in wanted.items()}
    return {stage: artifact for stage, artifact in found.items() if artifact is not None}


def run_trial(
    context: RunContext, trial: Trial, base: BaseModel, sources: DataSources, targets: Sequence[Target]
) -> dict[str, Artifact]:
    """The artifacts of the trial's stages, by stage."""
    work = Work(context, base, sources, trial_inputs(trial, base.digest, sources.digest, targets))
    run_stages(work)
    return work.made


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
