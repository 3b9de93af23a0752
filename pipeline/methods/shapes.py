"""How many parameters each method trains, and the rank at which it trains about as many as another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kasa.targets import Target
from pipeline.config.settings import AdapterSettings
from pipeline.methods.method import adalora_rank, norm_names

# Beyond, VeRA's shared projections are larger than its authors used by far, and slower than the base.
_WIDEST_VERA = 1024


def trainable_count(adapter: AdapterSettings, targets: Sequence[Target], model: nn.Module) -> int:
    """How many numbers the method of `adapter` trains; `model` may be on the meta device."""
    if adapter.method in _OF_MODEL:
        return _OF_MODEL[adapter.method](targets, model)
    sides = sum(target.in_features + target.out_features for target in targets)
    outputs = sum(target.out_features for target in targets)
    # For each unit of rank, and whatever the rank is.
    low_rank = (sides, 0)
    per_rank, fixed = {
        "kasa": (sides + (len(targets) if adapter.singular_values else 0), 0),
        "adalora": (sides + len(targets), 0),
        "dora": (sides, outputs),
        "vera": (len(targets), outputs),
        "fourierft": (len(targets), 0),
    }.get(adapter.method, low_rank)
    return fixed + per_rank * (adalora_rank(adapter.rank) if adapter.method == "adalora" else adapter.rank)


def _scaled_by_ia3(targets: Sequence[Target], model: nn.Module) -> int:
    from pipeline.methods.peft import feedforward_names

    inputs_scaled = set(feedforward_names(model, targets))
    return sum(t.in_features if t.name in inputs_scaled else t.out_features for t in targets)


def _in_norms(targets: Sequence[Target], model: nn.Module) -> int:
    return sum(parameter.numel() for name in norm_names(model) for parameter in model.get_submodule(name).parameters())


def _all(targets: Sequence[Target], model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Whose size is what the base makes it.
_OF_MODEL = {"ia3": _scaled_by_ia3, "layernorm": _in_norms, "full": _all}
FIXED = frozenset(_OF_MODEL)


def matching_rank(adapter: AdapterSettings, targets: Sequence[Target], model: nn.Module, budget: int) -> int:
    """The rank at which `adapter` trains as nearly `budget` numbers as it can; its own where rank means nothing to it."""
    if adapter.method in FIXED:
        return adapter.rank

    def count(rank: int) -> int:
        return trainable_count(adapter.model_copy(update={"rank": rank}), targets, model)

    # Over two ranks: AdaLoRA's first rank is half as much again, rounded up.
    rank = round(2 * (budget - count(1)) / (count(3) - count(1))) + 1
    rank = min((max(1, rank + step) for step in (-1, 0, 1)), key=lambda near: abs(count(near) - budget))
    # The largest rank a matrix can have, or the number of its entries.
    smallest = min(target.smaller_side for target in targets)
    largest = {"vera": _WIDEST_VERA, "fourierft": min(t.in_features * t.out_features for t in targets)}
    return max(1, min(rank, largest.get(adapter.method, smallest)))
