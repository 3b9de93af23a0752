"""All metrics there are, by name, in the order people read them."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.core.errors import RecipeError
from pipeline.metrics.scores import JUDGED_METRICS, LABEL_METRICS, LANGUAGE_METRICS
from pipeline.metrics.text import TEXT_METRICS

METRICS = {metric.name: metric for metric in (*TEXT_METRICS, *LABEL_METRICS, *LANGUAGE_METRICS, *JUDGED_METRICS)}
LOWER_IS_BETTER = frozenset(name for name, metric in METRICS.items() if metric.lower_is_better)
SHARES = frozenset(name for name, metric in METRICS.items() if metric.best == 1)


def check_measurable(names: Iterable[str]) -> None:
    """Whether this machine has what the metrics need; training should not run for nothing.

    Raises:
        RecipeError: it lacks something.
    """
    for name in names:
        if lacking := METRICS[name].lacks():
            raise RecipeError(f"evaluate.metrics: {name} needs {lacking}; or leave {name} out")
