"""What a comparison consists of: its methods, seeds and learning rates, and the trials that they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kasa.errors import nearest
from pipeline.apps.compare.methods import BASE, compared_methods, recipe_for
from pipeline.apps.compare.trials import Trial, made_already, trial, trial_keys
from pipeline.artifacts.store import ArtifactStore
from pipeline.config.evaluate import HarnessSettings
from pipeline.config.recipe import Recipe, recipe_values
from pipeline.core.errors import RecipeError
from pipeline.core.files import content_digest
from pipeline.data.sources import resolve_sources
from pipeline.methods.choice import check_ranks
from pipeline.models.base import find_base
from pipeline.models.shapes import meta_model, model_config
from pipeline.run.stages.train import deepspeed_settings
from pipeline.storage.workspace import look_into

# The reference where LoRA is among the methods and none is named; otherwise it is the base.
DEFAULT_AGAINST = "lora"


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison to run.

    Attributes:
        recipe: the recipe as it was given, without tasks of lm-evaluation-harness.
        methods: names of the methods, without the base.
        seeds: seeds of the trainings of each method.
        rates: learning rates to choose from for each method; empty takes the recipe's.
        against: the reference that all others are compared with, a method or the base.
    """

    recipe: Recipe
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    against: str

    @property
    def name(self) -> str:
        """The name of its folder and its MLflow run. It depends on the contents, so the same comparison is resumed."""
        values = recipe_values(self.recipe)
        values.pop("workspace")
        key = content_digest([values, self.methods, self.seeds, self.rates, self.against])
        return f"{self.recipe.name}-{key[:8]}"


@dataclass(frozen=True)
class TrialPlan:
    """A trial in a dry run.

    Attributes:
        name: of the trial.
        parameters: how many parameters it trains; None for the base, or while the base is not here.
        reused: the stages whose artifacts exist.
        made: the stages that are to run. Both are empty while the inputs of the trial are unknown.
    """

    name: str
    parameters: int | None
    reused: tuple[str, ...]
    made: tuple[str, ...]


def plan_comparison(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: int,
    seed_from: int | None,
    rates: Sequence[float],
    against: str | None,
) -> ComparisonPlan:
    """The comparison that the options of `kasa compare` describe.

    Args:
        recipe: the resolved recipe.
        methods: names of the methods.
        seeds: trainings of each method.
        seed_from: the first seed; None takes the recipe's.
        rates: learning rates to choose from; empty takes the recipe's.
        against: the reference; None takes LoRA where it is compared, or else the base.

    Raises:
        RecipeError: `against` is not among the methods, or one of them does not suit the recipe.
    """
    for method in methods:
        deepspeed_settings(recipe_for(recipe, method))
    first = recipe.train.seed if seed_from is None else seed_from
    if against is None:
        against = DEFAULT_AGAINST if DEFAULT_AGAINST in methods else BASE
    if against not in (BASE, *methods):
        raise RecipeError(
            f"--against {against} is not compared here{nearest(against, methods) or f'; choose from {BASE}, ' + ', '.join(methods)}"
        )
    evaluate = recipe.evaluate.model_copy(update={"harness": HarnessSettings()})
    recipe = recipe.model_copy(update={"evaluate": evaluate})
    return ComparisonPlan(recipe, tuple(methods), tuple(range(first, first + seeds)), tuple(rates), against)


def plan_trials(plan: ComparisonPlan) -> list[TrialPlan]:
    """`--dry-run`: the trials, and which of their artifacts exist; computes, fetches and starts nothing.

    Raises:
        KasaError: what the comparison itself would refuse, as far as it can be seen from here.
    """
    recipe = plan.recipe
    sources = resolve_sources(recipe.data, recipe.workspace, fetch=False)
    base = find_base(recipe.base, recipe.workspace, fetch=False)
    config = model_config(recipe.base.model, recipe.base.revision, base.folder if base else None)
    if base is None or sources is None or config is None:
        names = [f"{method}, seed {seed}" for seed in plan.seeds for method in plan.methods]
        return [TrialPlan(name, None, (), ()) for name in [BASE, *names]]
    targets = base.targets(recipe.adapter.targets)
    methods = compared_methods(recipe, plan.methods, targets, meta_model(config, recipe.base.head))
    for method in methods:
        check_ranks(method.recipe, targets)
    store = ArtifactStore(recipe.workspace, look_into(recipe.location))

    def planned(one: Trial, parameters: int | None) -> TrialPlan:
        wanted = trial_keys(one, base.digest, sources.digest, targets)
        there = made_already(store, wanted)
        return TrialPlan(one.name, parameters, tuple(there), tuple(stage for stage in wanted if stage not in there))

    trials = [planned(Trial(BASE, recipe), None)]
    trials += [
        planned(trial(method, plan.seeds[0], rate, is_tuning=True), method.parameters)
        for rate in plan.rates
        for method in methods
    ]
    return trials + [
        TrialPlan(f"{method.name}, seed {seed}, at the chosen rate", method.parameters, (), ())
        if plan.rates
        else planned(trial(method, seed, recipe.train.learning_rate), method.parameters)
        for seed in plan.seeds
        for method in methods
    ]
