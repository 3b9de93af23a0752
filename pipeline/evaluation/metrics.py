"""From per-sample results to metrics, and from two models' results to a paired difference with its interval.

ROUGE-L is rouge-score's F-measure with stemming, averaged over samples; chrF is sacrebleu's corpus chrF (default order 6,
beta 2). Both run from 0 to 100. A sample's own chrF (sacrebleu's sentence chrF) serves the paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.report.facts import Difference

# Smaller is better for these; for all others larger is.
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
# All metrics there are, in the order people read them.
METRICS = ("accuracy", "exact_match", "rouge_l", "chrf", "loss", "perplexity")
RESAMPLES = 2000

SampleResult = Mapping[str, Any]


def text_scores(output: str, reference: str) -> dict[str, float]:
    """ROUGE-L and chrF of one generated text, 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_chrf

    rouge = RougeScorer(["rougeL"], use_stemmer=True).score(reference, output)["rougeL"].fmeasure
    return {"rouge_l": 100 * rouge, "chrf": sentence_chrf(output, [reference]).score}


def aggregate(results: Sequence[SampleResult]) -> dict[str, float]:
    """A model's metrics over all samples: loss and perplexity per labelled token, and what else was measured."""
    tokens = sum(result["tokens"] for result in results)
    loss = sum(result["loss_sum"] for result in results) / tokens
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    for name in ("accuracy", "exact_match", "rouge_l"):
        if name in results[0]:
            metrics[name] = sum(result[name] for result in results) / len(results)
    if "chrf" in results[0]:
        from sacrebleu import corpus_chrf

        references = [[result["reference"] for result in results]]
        metrics["chrf"] = corpus_chrf([result["output"] for result in results], references).score
    return metrics


def paired_differences(
    ours: Sequence[SampleResult], theirs: Sequence[SampleResult], seed: int = 0
) -> dict[str, Difference]:
    """Metric by metric, ours - theirs on the same samples, with a 95% percentile bootstrap interval over samples.

    Loss is weighted by labelled tokens as in `aggregate`; chrF is the mean of the samples' own.
    """
    count = len(ours)
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    differences = {}
    for name in ("loss", "accuracy", "exact_match", "rouge_l", "chrf"):
        if name != "loss" and name not in ours[0]:
            continue
        values, weights = _differences(ours, theirs, name)
        resampled = (values[draws]).sum(axis=1) / weights[draws].sum(axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        differences[name] = Difference(float(values.sum() / weights.sum()), float(low), float(high))
    return differences


def _differences(
    ours: Sequence[SampleResult], theirs: Sequence[SampleResult], name: str
) -> tuple[np.ndarray, np.ndarray]:
    if name == "loss":
        values = [mine["loss_sum"] - other["loss_sum"] for mine, other in zip(ours, theirs, strict=True)]
        return np.array(values), np.array([float(mine["tokens"]) for mine in ours])
    values = [float(mine[name]) - float(other[name]) for mine, other in zip(ours, theirs, strict=True)]
    return np.array(values), np.ones(len(values))
