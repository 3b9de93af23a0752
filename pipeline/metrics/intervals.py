"""Metrics of samples' results, and differences between models or methods, each with its 95% interval.

For one model the interval is a percentile bootstrap over samples with 2,000 resamples. For the difference between two models
the same samples are drawn for both.

Of methods that were trained with several seeds, two things are left to chance, and the intervals cover both:

- the held-out samples: bootstrap. In each resample the same samples are drawn for all seeds and both methods, the metric of
  each seed is computed of the drawn samples, and the mean over seeds taken.
- the seeds: a handful, too few to draw from; with two, a bootstrap would find less than half the spread. So each resample is
  shifted by s / sqrt(K) times a draw of Student's t with K - 1 degrees of freedom, s being the standard deviation of the K
  seeds' metrics over all samples, as in the t interval of a mean.

For a difference between methods the seeds are paired: both methods' runs of one seed saw the same samples in the same order. A
p-value is two-sided: twice the share of resamples on the far side of zero, which agrees with the interval. With one seed the
spread between seeds is unknown, and the interval says by how much these very trainings differ.

A few samples that agree would give an interval of no width: a bootstrap draws only what it has seen. So an interval reaches at
least as far as that of Clopper and Pearson for N like results: up to q = 1 - 0.025^(1/N) of the samples may be of a kind that was
not seen, at the end of the scale or, in a difference, just the opposite. A difference can thus stand clear of zero from six
samples on, as in the sign test (`LEAST_SAMPLES`). Where nothing differs at all the interval is [0, 0].

Legend: N = samples, S = statistics of one metric, K = seeds, R = resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.metrics.catalogue import METRICS
from pipeline.metrics.metric import Floats, SampleResult

# The results of several trainings of one method on the same samples.
Runs = Sequence[Sequence[SampleResult]]

RESAMPLES = 2000
_TAIL = 0.025
# Of fewer, all could be for one side by chance alone in more than one case of twenty (2^(1 - N)).
LEAST_SAMPLES = 6
# How many draws are in memory at once, of 8 bytes each.
_DRAWS_HELD = 2**24


@dataclass(frozen=True)
class Interval:
    """A value with its 95% bootstrap interval; for a difference, of ours - theirs."""

    estimate: float
    low: float
    high: float

    def text(self, number: Callable[[float], str] = "{:+.4f}".format) -> str:
        """`estimate [low, high]`, each number as `number` writes it."""
        return f"{number(self.estimate)} [{number(self.low)}, {number(self.high)}]"


def measure(results: Sequence[SampleResult], metrics: Sequence[str], seed: int = 0) -> dict[str, Interval]:
    """The named metrics of one model's results."""
    tables = [METRICS[name].statistics(results) for name in metrics]
    return {
        name: _within_scale(
            interval_of(METRICS[name].value(table_NS.sum(axis=0)), METRICS[name].value(sums_RS)), name, len(results)
        )
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
        found[name] = _of_difference(interval_of(mine - others, mine_R - others_R), len(ours))
    return found


def mean_differences(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0) -> Interval:
    """The mean of ours - theirs over the samples, by their names, that both have; they must have some in common."""
    common = sorted(ours.keys() & theirs.keys())
    differences = np.array([ours[name] - theirs[name] for name in common])[:, None]
    (sums_R1,) = resampled_sums([differences], seed)
    return _of_difference(interval_of(differences.mean(), sums_R1[:, 0] / len(common)), len(common))


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


def _within_scale(interval: Interval, metric: str, samples: int) -> Interval:
    """The interval of a metric with a scale, not narrower than so few samples allow."""
    best, seen = METRICS[metric].best, _seen(samples)
    if best is None:
        return interval
    estimate = min(max(interval.estimate, 0.0), best)  # rounding may lead beyond
    lowest, highest = seen * estimate, best - seen * (best - estimate)
    return replace(interval, low=min(interval.low, lowest), high=max(interval.high, highest))


def _of_difference(interval: Interval, samples: int) -> Interval:
    """The interval of a difference, not narrower on the side of zero than so few samples allow."""
    nearest_zero = (2 * _seen(samples) - 1) * interval.estimate
    if interval.estimate > 0:
        return replace(interval, low=min(interval.low, nearest_zero))
    return replace(interval, high=max(interval.high, nearest_zero))


def _seen(samples: int) -> float:
    """The share of all there is that a kind of sample has at least, if all samples drawn are of that kind."""
    return float(_TAIL ** (1 / samples))


@dataclass(frozen=True)
class Difference:
    """Ours - theirs, the mean over seeds.

    Attributes:
        by_seed: the difference of each seed.
        p_value: two-sided, of no difference.
    """

    interval: Interval
    by_seed: tuple[float, ...]
    p_value: float


def mean_over_seeds(runs: Runs, metric: str, seed: int = 0) -> Interval:
    """The mean of a metric over the runs of one method, one for each seed, on the same samples.

    Raises:
        ValueError: the samples are not the same.
    """
    _check_same_samples(runs)
    values_K, resampled_KR = _values(runs, metric, seed)
    return _within_scale(
        interval_of(np.mean(values_K), _with_spread(values_K, resampled_KR, seed)), metric, len(runs[0])
    )


def difference_over_seeds(ours: Runs, theirs: Runs, metric: str, seed: int = 0) -> Difference:
    """Two methods' runs, seed by seed; what was not trained (a base) is one run, which stands for every seed.

    Raises:
        ValueError: the samples or the numbers of seeds are not the same.
    """
    _check_same_samples([*ours, *theirs])
    if len(ours) != len(theirs) and 1 not in (len(ours), len(theirs)):
        raise ValueError(f"{len(ours)} runs cannot be paired with {len(theirs)}")
    values, resampled = _values([*ours, *theirs], metric, seed)
    count = len(ours)
    by_seed_K = values[:count] - values[count:]
    resampled_R = _with_spread(by_seed_K, resampled[:count] - resampled[count:], seed)
    beyond = min(int((resampled_R <= 0).sum()), int((resampled_R >= 0).sum()))
    samples = len(ours[0])
    p_value = min(1.0, max(2 * (beyond + 1) / (RESAMPLES + 1), 2.0 ** (1 - samples)))
    interval = _of_difference(interval_of(np.mean(by_seed_K), resampled_R), samples)
    return Difference(interval, tuple(map(float, by_seed_K)), p_value)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for several tests (Holm 1979): those below 0.05 hold together, with an error of at most 5%."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _values(runs: Runs, metric: str, seed: int) -> tuple[Floats, Floats]:
    """Each run's metric over all samples, (K,), and over every resample of them, (K, R)."""
    one = METRICS[metric]
    tables = [one.statistics(results) for results in runs]
    values_K = np.array([float(one.value(table_NS.sum(axis=0))) for table_NS in tables])
    return values_K, np.stack([one.value(sums_RS) for sums_RS in resampled_sums(tables, seed)])


def _with_spread(values_K: Floats, resampled_KR: Floats, seed: int) -> Floats:
    means_R = resampled_KR.mean(axis=0)
    count = len(values_K)
    if count < 2:
        return means_R
    # A stream of its own, independent of the one that draws samples.
    shifts_R = np.random.default_rng([seed, count]).standard_t(count - 1, len(means_R))
    return means_R + shifts_R * values_K.std(ddof=1) / np.sqrt(count)


def _check_same_samples(runs: Runs) -> None:
    orders = [[result["sample"] for result in results] for results in runs]
    if any(order != orders[0] for order in orders):
        raise ValueError("methods can only be compared on the same samples, in the same order")
