"""From samples' results to metrics, and to the difference between two models, each with its interval.

95% percentile bootstrap over samples, 2,000 resamples. For a difference the same samples are drawn for both models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics.catalogue import METRICS
from pipeline.metrics.metric import Floats, SampleResult

RESAMPLES = 2000
_TAIL = 0.025
# Bounds the memory of the draws: 8 bytes each.
_DRAWS_HELD = 2**24


@dataclass(frozen=True)
class Interval:
    """A value with its 95% bootstrap interval; for a difference, of ours - theirs."""

    estimate: float
    low: float
    high: float


def measure(results: Sequence[SampleResult], metrics: Sequence[str], seed: int = 0) -> dict[str, Interval]:
    """The named metrics of one model's results."""
    tables = [METRICS[name].statistics(results) for name in metrics]
    return {
        name: interval_of(METRICS[name].value(table_NS.sum(axis=0)), METRICS[name].value(sums_RS))
        for name, table_NS, sums_RS in zip(metrics, tables, resampled_sums(tables, seed), strict=True)
    }


def paired_differences(
    ours: Sequence[SampleResult], theirs: Sequence[SampleResult], metrics: Sequence[str], seed: int = 0
) -> dict[str, Interval]:
    """Metric by metric, ours - theirs on the same samples in the same order.

    Raises:
        ValueError: the samples are not the same.
    """
    if [result["sample"] for result in ours] != [result["sample"] for result in theirs]:
        raise ValueError("two models can only be compared on the same samples, in the same order")
    tables = [METRICS[name].statistics(results) for name in metrics for results in (ours, theirs)]
    sums = resampled_sums(tables, seed)
    found = {}
    for index, name in enumerate(metrics):
        value, pair = METRICS[name].value, slice(2 * index, 2 * index + 2)
        mine, others = (value(table_NS.sum(axis=0)) for table_NS in tables[pair])
        mine_R, others_R = (value(sums_RS) for sums_RS in sums[pair])
        found[name] = interval_of(mine - others, mine_R - others_R)
    return found


def mean_differences(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0) -> Interval:
    """The mean of ours - theirs over the samples, by their names, that both have; they must have some in common."""
    common = sorted(ours.keys() & theirs.keys())
    differences = np.array([ours[name] - theirs[name] for name in common])[:, None]
    (sums_R1,) = resampled_sums([differences], seed)
    return interval_of(differences.mean(), sums_R1[:, 0] / len(common))


def resampled_sums(tables: Sequence[Floats], seed: int) -> list[Floats]:
    """For each table (N, S) of the same samples, the sums over every resample, (R, S)."""
    if not tables:
        return []
    count = len(tables[0])
    joined_NS, generator = np.concatenate(tables, axis=1), np.random.default_rng(seed)
    block = max(1, _DRAWS_HELD // count)
    sums = [
        # How often each resample draws each sample.
        generator.multinomial(count, np.full(count, 1 / count), min(block, RESAMPLES - start)) @ joined_NS
        for start in range(0, RESAMPLES, block)
    ]
    return np.split(np.concatenate(sums), np.cumsum([table.shape[1] for table in tables])[:-1], axis=1)


def interval_of(estimate: Floats | np.floating, resampled_R: Floats) -> Interval:
    """An estimate with the 95% percentile interval of its resamples."""
    low, high = np.quantile(resampled_R, [_TAIL, 1 - _TAIL])
    return Interval(float(estimate), float(low), float(high))
