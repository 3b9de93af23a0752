"""What `kasa compare` can compare, by name: the recipe of each method, its rank at one parameter budget, its learning rate.

`--tune` tries the same few learning rates for every method, and chooses by the loss on the validation samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from kasa.errors import nearest
from kasa.targets import Target
from kasa.truncation import Truncation
from pipeline.config.methods import METHODS, REFERENCE
from pipeline.config.recipe import Recipe, parse_recipe, recipe_values
from pipeline.core.errors import RecipeError
from pipeline.methods.choice import matching_rank, trainable_count

if TYPE_CHECKING:
    from torch import nn

# From what suits full fine-tuning to what methods with few parameters need.
DEFAULT_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


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
    if len(rates) < 2 or not rates[0] > 0:
        raise RecipeError(f"--tune {text}: name at least two different rates above 0")
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


BASE = "base"
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
    values = recipe_values(recipe)
    values["adapter"] |= changes
    return parse_recipe(values, f"the recipe for {name}")


def _compared_method(
    recipe: Recipe, name: str, targets: Sequence[Target], model: nn.Module, budget: int
) -> ComparedMethod:
    made = recipe_for(recipe, name)
    if made.adapter.method != REFERENCE:
        made = recipe_for(recipe, name, matching_rank(made.adapter, targets, model, budget))
    return ComparedMethod(name, made, trainable_count(made.adapter, targets, model))
