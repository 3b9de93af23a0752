"""What a comparison consists of: its methods by name, seeds and learning rates, and the trials that they come to.

Each method has the recipe's data and steps, and the rank at which it trains as nearly as it can as many parameters. `--tune`
tries the same few learning rates for every method, and chooses by the loss on the validation samples. A trial is one training
of one method with its evaluation, found in the workspace or made by the usual stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from kasa.errors import nearest
from kasa.targets import Target
from kasa.truncation import Truncation
from pipeline.config.methods import METHODS, REFERENCE
from pipeline.config.recipe import Recipe, parse_recipe, plain_values, recipe_values
from pipeline.config.section import LARGEST_RATE
from pipeline.config.settings import HarnessSettings
from pipeline.core.errors import RecipeError
from pipeline.core.files import content_digest
from pipeline.data.sources import DataSources, resolve_sources
from pipeline.methods.choice import check_ranks, matching_rank, trainable_count
from pipeline.models.base import BaseModel, find_base
from pipeline.models.loading import empty_base
from pipeline.run import graph as keys
from pipeline.run.context import RunContext
from pipeline.run.dependencies import KeyInputs
from pipeline.run.stage_runs import Work, run_stages
from pipeline.run.stages.train import deepspeed_settings
from pipeline.storage.artifacts import Artifact, ArtifactStore, StageKey
from pipeline.storage.workspace import look_into

if TYPE_CHECKING:
    from torch import nn

# From what suits full fine-tuning to what methods with few parameters need.
DEFAULT_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

BASE = "base"
# Name -> what it is, with its unit.
COSTS = {
    "trainable_parameters": "trained parameters",
    "start_s": "s to the first step",
    "tokens_per_second": "tokens/s",
    "memory_gib": "memory, GiB",
    "adapter_mib": "adapter, MiB",
}
# The reference where LoRA is among the methods and none is named; otherwise it is the base.
DEFAULT_AGAINST = "lora"


@dataclass(frozen=True)
class ChosenRate:
    """The result of tuning one method.

    Attributes:
        losses: learning rate -> validation loss in nats; a rate at which training diverged is missing.
        at_edge: whether the best is the smallest or largest that was tried, so that a better one may lie beyond.
    """

    rate: float
    losses: dict[float, float]
    at_edge: bool


def tuned_rates(text: str | None, recipe: Recipe) -> tuple[float, ...]:
    """The rates that `--tune TEXT` tries, ascending; none without it.

    Raises:
        RecipeError: the text is neither `lr` nor `learning_rate=A,B,...`, or there are no validation samples to tune on.
    """
    if text is None:
        return ()
    name, _, values = text.partition("=")
    if name.strip() not in ("lr", "learning_rate", "train.learning_rate"):
        raise RecipeError(f"--tune {text}: only the learning rate is tuned; write lr, or learning_rate=1e-4,3e-4,1e-3")
    try:
        rates = sorted({float(value) for value in values.split(",")}) if values else list(DEFAULT_RATES)
    except ValueError:
        raise RecipeError(f"--tune {text}: {values} is no list of numbers such as 1e-4,3e-4,1e-3") from None
    if len(rates) < 2 or not all(0 < rate <= LARGEST_RATE for rate in rates):
        raise RecipeError(f"--tune {text}: name at least two different rates above 0, at most {LARGEST_RATE:g}")
    if recipe.data.validation_rows is None:
        raise RecipeError(
            "--tune chooses on validation samples, never on the held-out ones; set data.validation_rows, such as 200"
        )
    return tuple(rates)


def choose_rate(rates: Sequence[float], losses: Mapping[float, float]) -> ChosenRate | None:
    """The rate with the lowest validation loss, the smaller of equals; None where training diverged at every one."""
    if not losses:
        return None
    best = min(losses, key=lambda rate: (losses[rate], rate))
    return ChosenRate(best, dict(losses), best in (min(rates), max(rates)))


# Variants of KaSA: changes of the recipe's `adapter`.
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{f"kasa:{rule}": {"truncation": rule} for rule in get_args(Truncation)},
    "kasa-without-d": {"singular_values": False},
    "kasa-without-l2": {"singular_value_weight": 0.0},
    "kasa-without-l3": {"orthogonality_weight": 0.0},
}


@dataclass(frozen=True)
class ComparedMethod:
    """A method in a comparison.

    Attributes:
        name: as it was asked for.
        recipe: with its rank; seed and learning rate are still those of the recipe that was given.
        parameters: how many numbers it trains.
    """

    name: str
    recipe: Recipe
    parameters: int


def comparable() -> tuple[str, ...]:
    """The names of everything that can be trained in a comparison: the methods, then the variants of KaSA."""
    return (*METHODS, *_VARIANTS)


def method_names(text: str) -> list[str]:
    """The names in `kasa,lora,...`, without the base, which every comparison shows.

    Raises:
        RecipeError: there is no such method, or it is named twice, or none is.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        known = (BASE, *comparable())
        if name not in known:
            hint = nearest(name, known) or f"; choose from {', '.join(known)}"
            raise RecipeError(f"--methods: there is no method {name!r}{hint}")
        if names.count(name) > 1:
            raise RecipeError(f"--methods names {name} twice")
    if not [name for name in names if name != BASE]:
        raise RecipeError("--methods names no method to train, such as kasa,lora")
    return [name for name in names if name != BASE]


def compared_methods(
    recipe: Recipe, names: Sequence[str], targets: Sequence[Target], model: nn.Module
) -> list[ComparedMethod]:
    """The methods, each at the rank at which it trains as nearly as it can what KaSA trains by the recipe.

    alpha / rank stays that of the recipe. `model` may be on the meta device.

    Raises:
        RecipeError: the recipe cannot be used with one of them.
    """
    budget = trainable_count(recipe.adapter.model_copy(update={"method": REFERENCE}), targets, model)
    return [_compared_method(recipe, name, targets, model, budget) for name in names]


def recipe_for(recipe: Recipe, name: str, rank: int | None = None) -> Recipe:
    """The recipe with the method `name`, at another rank if one is given.

    Raises:
        RecipeError: the rest of the recipe does not suit the method.
    """
    if recipe.train.start == "champion":
        raise RecipeError(
            "train.start champion: a comparison starts every method from scratch; use train.start scratch"
        )
    changes = {"method": REFERENCE, **_VARIANTS[name]} if name in _VARIANTS else {"method": name}
    if rank is not None:
        changes |= {"rank": rank, "alpha": recipe.adapter.alpha * rank / recipe.adapter.rank}
    values = plain_values(recipe)
    values["adapter"] |= changes
    return parse_recipe(values, f"the recipe for {name}")


def _compared_method(
    recipe: Recipe, name: str, targets: Sequence[Target], model: nn.Module, budget: int
) -> ComparedMethod:
    made = recipe_for(recipe, name)
    if made.adapter.method != REFERENCE:
        made = recipe_for(recipe, name, matching_rank(made.adapter, targets, model, budget))
    return ComparedMethod(name, made, trainable_count(made.adapter, targets, model))


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


def trial_inputs(
    trial: Trial, base: str, sources: str, targets: Sequence[Target], base_drops: bool = False
) -> KeyInputs:
    """What the keys of the trial's stages are made from (see there); `base` and `sources` are digests."""
    return KeyInputs(
        trial.recipe,
        base,
        sources,
        targets,
        until=keys.TRAIN if trial.is_tuning else keys.EVALUATE,
        trains=trial.method != BASE,
        base_drops=base_drops,
    )


def trial_keys(
    trial: Trial, base: str, sources: str, targets: Sequence[Target], base_drops: bool = False
) -> dict[str, StageKey]:
    """The key of each stage that the trial needs; the arguments are those of `trial_inputs`."""
    return keys.stage_keys(trial_inputs(trial, base, sources, targets, base_drops))


def made_already(find: Callable[[StageKey], Artifact | None], wanted: Mapping[str, StageKey]) -> dict[str, Artifact]:
    """Those of the artifacts that are there, as `ArtifactStore.find` or, to work with them, `ArtifactStore.reuse` says."""
    found = {stage: find(key) for stage, key in wanted.items()}
    return {stage: artifact for stage, artifact in found.items() if artifact is not None}


def run_trial(
    context: RunContext, trial: Trial, base: BaseModel, sources: DataSources, targets: Sequence[Target]
) -> dict[str, Artifact]:
    """The artifacts of the trial's stages, by stage."""
    work = Work(context, base, sources, trial_inputs(trial, base.digest, sources.digest, targets, base.drops))
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

    def recipe_at(self, rate: float) -> Recipe:
        """The recipe with another learning rate."""
        train = self.recipe.train.model_copy(update={"learning_rate": rate})
        return self.recipe.model_copy(update={"train": train})


def plan_tuning(recipe: Recipe, text: str) -> ComparisonPlan:
    """The trainings of the recipe's own method that `kasa run --tune TEXT` begins with.

    Raises:
        RecipeError: as `tuned_rates`; or the recipe starts from the champion, whose rate is a matter of its own.
    """
    rates = tuned_rates(text, recipe)
    recipe_for(recipe, recipe.adapter.method)
    return ComparisonPlan(recipe, (recipe.adapter.method,), (recipe.train.seed,), rates, BASE)


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
    if base is None or sources is None:
        names = [f"{method}, seed {seed}" for seed in plan.seeds for method in plan.methods]
        return [TrialPlan(name, None, (), ()) for name in [BASE, *names]]
    targets = base.targets(recipe.adapter.targets)
    methods = compared_methods(recipe, plan.methods, targets, empty_base(base.folder, recipe.base.head))
    for method in methods:
        check_ranks(method.recipe, targets)
    store = ArtifactStore(recipe.workspace, look_into(recipe.location))

    def planned(one: Trial, parameters: int | None) -> TrialPlan:
        wanted = trial_keys(one, base.digest, sources.digest, targets, base.drops)
        there = made_already(store.find, wanted)
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
