"""Loss and perplexity per labelled token, and the three ways to score a choice."""

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
    Metric("accuracy_norm", "Accuracy, by length", mean_of("accuracy_norm"), ratio, best=1),
    Metric("accuracy_generated", "Accuracy, generated", mean_of("accuracy_generated"), ratio, best=1),
    Metric("loss", "Loss", _losses, ratio, lower_is_better=True),
    Metric("perplexity", "Perplexity", _losses, _perplexity, lower_is_better=True),
)
