"""Generated texts against their references, one or several for each sample. All run from 0 to 100.

ROUGE-L is rouge-score's F-measure with stemming, the best over a sample's references, averaged over samples. chrF is
sacrebleu's corpus chrF with its defaults (order 6, beta 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from pipeline.metrics.metric import Floats, Metric, SampleResult, ratio


def _rouge_l(results: Sequence[SampleResult]) -> Floats:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(reference, result["output"])["rougeL"].fmeasure for reference in result["references"])
        for result in results
    ]
    return np.array([(100 * score, 1.0) for score in best])


def _sacrebleu_statistics(make: Callable[[], Any]) -> Callable[[Sequence[SampleResult]], Floats]:
    """The counts that sacrebleu itself adds up over a corpus."""

    def statistics(results: Sequence[SampleResult]) -> Floats:
        # One list for each reference's place; None where a sample has fewer.
        places = [list(place) for place in zip_longest(*(result["references"] for result in results))]
        counts = make()._extract_corpus_statistics([result["output"] for result in results], places)
        return np.array(counts, dtype=np.float64)

    return statistics


def _sacrebleu_value(make: Callable[[], Any]) -> Callable[[Floats], Floats]:
    def value(sums: Floats) -> Floats:
        scorer = make()
        rows = sums.reshape(-1, sums.shape[-1])
        scores = [scorer._compute_score_from_stats([int(count) for count in row]).score for row in rows]
        return np.array(scores).reshape(sums.shape[:-1])

    return value


def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


TEXT_METRICS = (
    Metric("rouge_l", "ROUGE-L", _rouge_l, ratio, best=100),
    Metric("chrf", "chrF", _sacrebleu_statistics(_chrf), _sacrebleu_value(_chrf), best=100),
)
