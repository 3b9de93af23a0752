"""`--tune`: the same few learning rates for every method, chosen by the loss on the validation samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe

# From what full fine-tuning bears to what methods with few parameters need.
DEFAULT_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class ChosenRate:
    """What tuning came to for one method.

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
