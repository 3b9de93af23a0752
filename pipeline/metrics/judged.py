"""What a judge says of answers, a sample being a question with all its turns."""

from __future__ import annotations

from pipeline.metrics.metric import Metric, mean_of, ratio

JUDGED_METRICS = (
    Metric("grade", "Grade", mean_of("grade"), ratio, best=10),
    Metric("win_rate", "Win rate", mean_of("won"), ratio, best=1),
)
