"""From a recipe to its method: what the method cannot do, how many parameters it trains, and the method itself.

Everything is read from the method's entry in `pipeline.config.methods`; the module that builds the method is imported when
it is needed. Neither torch nor numpy is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa.targets import Target, check_rank
from pipeline.config.deepspeed import zero_stage
from pipeline.config.methods import REFERENCE, AdapterSettings, Layers
from pipeline.config.recipe import Recipe
from pipeline.core.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.methods.method import Method
    from pipeline.models.base import BaseModel


def check_method(recipe: Recipe, deepspeed: dict[str, Any]) -> None:
    """Refuse a ZeRO stage or a precision that the recipe's method cannot be trained with.

    Args:
        deepspeed: the complete DeepSpeed configuration.

    Raises:
        RecipeError: naming the setting and what to choose instead.
    """
    spec, stage = recipe.adapter.spec, zero_stage(deepspeed)
    largest = spec.largest_stage
    if stage > largest:
        kind = "gpu" if recipe.train.gpu else "cpu"
        known = f" (such as {kind}_zero{largest})" if largest or not recipe.train.gpu else ""
        raise RecipeError(
            f"adapter.method {spec.name} works up to ZeRO stage {largest}, for {spec.stage_reason}; train.deepspeed "
            f"{recipe.train.deepspeed} is stage {stage}: choose one of stage {largest}{known}"
        )
    if spec.only_fp32 and recipe.train.precision != "fp32":
        raise RecipeError(f"adapter.method {spec.name} needs train.precision=fp32: {spec.only_fp32}")


def check_registrable(recipe: Recipe) -> None:
    """Refuse a run of a method whose adapters the registry cannot hold.

    Raises:
        RecipeError: the method is for comparisons only.
    """
    method = recipe.adapter.method
    if not recipe.adapter.spec.registrable:
        raise RecipeError(
            f"adapter.method {method}: a run ends with a model in the registry, which serves and promotes KaSA adapters "
            f"alone; `kasa compare RECIPE --methods {REFERENCE},{method}` trains and evaluates it, and keeps its adapter"
        )


def check_ranks(recipe: Recipe, targets: Sequence[Target]) -> None:
    """Refuse a rank that the weights of the targets cannot have.

    Raises:
        TargetError: naming the target and the setting.
    """
    spec = recipe.adapter.spec
    if "alpha" in spec.settings:
        # Without alpha / rank, the rank is no rank of a matrix (see `MethodSpec.rank_meaning`).
        check_rank(targets, recipe.adapter.rank, "adapter.rank")
    if spec.components == "dropped":
        key = "spectra.rank" if recipe.spectra.rank else "adapter.truncation_rank"
        check_rank(targets, recipe.spectra_rank, key)


def method_of(
    recipe: Recipe, base: BaseModel, targets: Sequence[Target], spectra: Path | None, start: Path | None = None
) -> Method:
    """Build the recipe's method.

    Args:
        spectra: folder of the components that the spectra stage computed; None where the method begins with none.
        start: folder of the adapter to warm-start from, if any.
    """
    method: Method = import_module(recipe.adapter.spec.module).build(recipe, base, tuple(targets), spectra, start)
    return method


def trainable_count(adapter: AdapterSettings, targets: Sequence[Target], model: nn.Module) -> int:
    """How many numbers the method of `adapter` trains; `model` may be on the meta device."""
    spec = adapter.spec
    if spec.parameters is None:
        return int(import_module(spec.module).parameter_count(spec.name, targets, model))
    outputs = sum(target.out_features for target in targets)
    sides = sum(target.in_features for target in targets) + outputs
    return spec.parameters(adapter, Layers(len(targets), outputs, sides))


def matching_rank(adapter: AdapterSettings, targets: Sequence[Target], model: nn.Module, budget: int) -> int:
    """The rank at which the method of `adapter` trains as nearly `budget` numbers as it can.

    Where the base alone decides how many it trains, that is the rank that is there.
    """
    if adapter.spec.parameters is None:
        return adapter.rank

    def count(rank: int) -> int:
        return trainable_count(adapter.model_copy(update={"rank": rank}), targets, model)

    # The slope over two ranks: AdaLoRA's first rank is half as much again, rounded up.
    rank = round(2 * (budget - count(1)) / (count(3) - count(1))) + 1
    rank = min((max(1, rank + step) for step in (-1, 0, 1)), key=lambda near: abs(count(near) - budget))
    return max(1, min(rank, adapter.spec.largest_rank(targets)))
