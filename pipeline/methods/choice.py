"""From a recipe to its method: which settings count, what a method cannot do, and the method itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa import KasaConfig
from kasa.targets import Target, check_rank
from pipeline.config.deepspeed import zero_stage
from pipeline.config.recipe import Recipe
from pipeline.config.settings import METHOD_SETTINGS
from pipeline.core.errors import RecipeError

if TYPE_CHECKING:
    from pipeline.methods.method import Method
    from pipeline.models.base import BaseModel

# The largest ZeRO stage of methods that need whole weights or whole gradients.
_LARGEST_STAGE = {"adalora": 0, "pissa": 2, "milora": 2, "olora": 2, "corda": 2, "layernorm": 2}
_WHY = {
    "adalora": "it needs whole gradients between steps",
    "pissa": "it takes whole base weights apart",
    "milora": "it takes whole base weights apart",
    "olora": "it takes whole base weights apart",
    "corda": "it takes whole base weights apart",
    "layernorm": "it copies whole weights of the base",
}


def check_method(recipe: Recipe, deepspeed: dict[str, Any]) -> None:
    """Refuse what the recipe's method cannot do.

    Args:
        deepspeed: the complete DeepSpeed configuration.

    Raises:
        RecipeError: it needs another ZeRO stage or precision.
    """
    method, stage = recipe.adapter.method, zero_stage(deepspeed)
    largest = _LARGEST_STAGE.get(method, 3)
    if stage > largest:
        kind = "gpu" if recipe.train.gpu else "cpu"
        known = f" (such as {kind}_zero{largest})" if largest or not recipe.train.gpu else ""
        raise RecipeError(
            f"adapter.method {method} works up to ZeRO stage {largest}, for {_WHY[method]}; train.deepspeed "
            f"{recipe.train.deepspeed} is stage {stage}: choose one of stage {largest}{known}"
        )
    if method == "adalora" and recipe.train.precision != "fp32":
        raise RecipeError(
            "adapter.method adalora needs train.precision=fp32: in bf16 DeepSpeed keeps the gradients to itself"
        )


def check_registrable(recipe: Recipe) -> None:
    """Refuse a run that would have to register what the registry's models cannot be.

    Raises:
        RecipeError: the method is not KaSA.
    """
    if recipe.adapter.method != "kasa":
        raise RecipeError(
            f"adapter.method {recipe.adapter.method}: a run ends with a model in the registry, which serves and promotes "
            "KaSA adapters alone; `kasa compare RECIPE --methods kasa,"
            f"{recipe.adapter.method}` trains and evaluates it, and keeps its adapter"
        )


def check_ranks(recipe: Recipe, targets: Sequence[Target]) -> None:
    """Refuse a rank that the targets do not have.

    Raises:
        TargetError: naming the target and the setting.
    """
    if "alpha" in METHOD_SETTINGS[recipe.adapter.method]:
        check_rank(targets, recipe.adapter.rank, "adapter.rank")
    if recipe.adapter.method == "kasa":
        check_rank(targets, recipe.spectra_rank, "spectra.rank")


def method_of(
    recipe: Recipe, base: BaseModel, targets: Sequence[Target], spectra: Path | None, start: Path | None = None
) -> Method:
    """The recipe's method.

    Args:
        spectra: folder of the spectra, where the method begins with some.
        start: folder of the KaSA adapter to go on from, if any.
    """
    adapter = recipe.adapter
    if adapter.method == "kasa":
        from pipeline.methods.kasa import KasaMethod

        return KasaMethod(base.name, base.folder, tuple(targets), kasa_config(recipe), spectra, start)
    if adapter.method == "full":
        from pipeline.methods.full import FullMethod
        from pipeline.models.loading import DTYPES

        return FullMethod(base.name, DTYPES[recipe.train.precision])
    from pipeline.methods.peft import PeftMethod

    return PeftMethod(adapter.method, tuple(targets), adapter.rank, adapter.alpha, adapter.dropout, base.name, spectra)


def kasa_config(recipe: Recipe) -> KasaConfig:
    """The recipe's adapter section in the method library's terms."""
    settings = recipe.adapter
    return KasaConfig(
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        truncation=settings.truncation,
        dropped_rank=recipe.dropped_rank,
        regulariser=settings.regulariser,
        singular_value_weight=settings.singular_value_weight if settings.singular_values else 0.0,
        orthogonality_weight=settings.orthogonality_weight,
        singular_values=settings.singular_values,
    )
