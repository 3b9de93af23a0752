"""All metrics there are, by name, in the order people read them."""

from __future__ import annotations

from pipeline.metrics.judged import JUDGED_METRICS
from pipeline.metrics.language import LANGUAGE_METRICS
from pipeline.metrics.text import TEXT_METRICS

METRICS = {metric.name: metric for metric in (*TEXT_METRICS, *LANGUAGE_METRICS, *JUDGED_METRICS)}
LOWER_IS_BETTER = frozenset(name for name, metric in METRICS.items() if metric.lower_is_better)
SHARES = frozenset(name for name, metric in METRICS.items() if metric.best == 1)
