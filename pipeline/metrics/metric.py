"""A metric: per-sample statistics that are summed over samples, and the metric's value of the sums.

Whatever is measured here has this form (an accuracy, a loss per token, a corpus BLEU, a correlation). So one bootstrap serves
all: samples are drawn, their statistics summed, and the metric's own formula applied to every draw.

Legend: N = samples, S = statistics of one metric, R = resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
SampleResult = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """How one metric is computed from samples' results.

    Attributes:
        name: as recipes, MLflow and the report have it.
        label: as people write it.
        statistics: results -> (N, S); each row must depend on its own sample and, at most, on all samples' references.
        value: (..., S), sums over samples -> (...).
        best: the largest value there is; None where there is none. 1 marks a share, shown as a percentage.
        lower_is_better: whether smaller values are the better ones.
        lacks: what this machine lacks to measure it, with the remedy; None where nothing is missing.
    """

    name: str
    label: str
    statistics: Callable[[Sequence[SampleResult]], Floats]
    value: Callable[[Floats], Floats]
    best: float | None = None
    lower_is_better: bool = False
    lacks: Callable[[], str | None] = lambda: None


def mean_of(field: str, scale: float = 1.0) -> Callable[[Sequence[SampleResult]], Floats]:
    """Statistics of the mean of a field of the results, times `scale`; its value is `ratio`."""

    def statistics(results: Sequence[SampleResult]) -> Floats:
        return np.array([(scale * float(result[field]), 1.0) for result in results])

    return statistics


def ratio(sums: Floats) -> Floats:
    """First statistic over the second."""
    return sums[..., 0] / sums[..., 1]
