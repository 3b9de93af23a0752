"""A metric: per-sample statistics that are summed over samples, and the metric's value of the sums.

Whatever is measured here has this form (an accuracy, a loss per token, a corpus BLEU, a correlation). So one bootstrap serves
all: samples are drawn, their statistics summed, and the metric's own formula applied to every draw.

A metric is one entry in the module of its family (`text`, `scores`), with its computation beside it. Recipes read the entries
when they are validated, in commands that compute nothing. So these modules import numpy and the libraries of metrics only
inside of the functions that compute.

Legend: N = samples, S = statistics of one metric, R = resamples.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Floats: TypeAlias = "npt.NDArray[np.float64]"
SampleResult = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """How one metric is computed from samples' results, and when.

    Attributes:
        name: as recipes, MLflow and the report have it.
        label: as people write it.
        statistics: results -> (N, S). Each row must depend on its own sample and, at most, on all samples' references.
        value: (..., S), sums over samples -> (...).
        kinds: the kinds of evaluation (`evaluate.kind`) that measure it.
        by_default: whether they always do; otherwise the recipe has to ask for it.
        decides: the kinds in which promotion is decided on it, unless the recipe names another.
        best: the largest value there is; None where there is none. 1 marks a share, which is shown as a percentage.
        lower_is_better: whether smaller values are the better ones.
        classes: how many classes it needs; None where it does not matter.
        package: the package that computes it, where it does not come with this one but with its extra `extra`.
        java: whether it needs a Java runtime.
    """

    name: str
    label: str
    statistics: Callable[[Sequence[SampleResult]], Floats]
    value: Callable[[Floats], Floats]
    kinds: tuple[str, ...]
    by_default: bool = True
    decides: tuple[str, ...] = ()
    best: float | None = None
    lower_is_better: bool = False
    classes: int | None = None
    package: str = ""
    extra: str = ""
    java: bool = False

    def lacks(self) -> str | None:
        """What this machine lacks to measure it, with the remedy; None where nothing is missing."""
        if self.java and shutil.which("java") is None:
            return "a Java runtime (java on the PATH), such as Debian's default-jre-headless"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package}: pip install 'kasa-pipeline[{self.extra}]'"
        return None


def table(rows: Sequence[Sequence[float]]) -> Floats:
    """One row of statistics for each sample as an array (N, S)."""
    import numpy as np

    return np.array(rows, dtype=np.float64)


def mean_of(field: str, scale: float = 1.0) -> Callable[[Sequence[SampleResult]], Floats]:
    """Statistics of the mean of a field of the results, times `scale`; its value is `ratio`."""

    def statistics(results: Sequence[SampleResult]) -> Floats:
        return table([(scale * float(result[field]), 1.0) for result in results])

    return statistics


def ratio(sums: Floats) -> Floats:
    """First statistic over the second."""
    return sums[..., 0] / sums[..., 1]
