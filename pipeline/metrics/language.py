"""Loss and perplexity per labelled token, and shares of right answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.metrics.metric import Floats, Metric, SampleResult, mean_of, ratio

# exp of more is no number any more.
_LARGEST_LOSS = 700.0


def _losses(results: Sequence[SampleResult]) -> Floats:
    return np.array([(result["loss_sum"], float(result["tokens"])) for result in results])


def _perplexity(sums: Floats) -> Floats:
    return np.exp(np.minimum(ratio(sums), _LARGEST_LOSS))


LANGUAGE_METRICS = (
    Metric("accuracy", "Accuracy", mean_of("accuracy"), ratio, best=1),
    Metric("exact_match", "Exact match", mean_of("exact_match"), ratio, best=1),
    Metric("loss", "Loss", _losses, ratio, lower_is_better=True),
    Metric("perplexity", "Perplexity", _losses, _perplexity, lower_is_better=True),
)
