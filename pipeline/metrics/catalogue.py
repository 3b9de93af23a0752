"""Metrics of the other kinds of evaluation: choices, labels, loss, and what a judge says of answers.

Labels are compared as scikit-learn and scipy do it: results hold `label`, `prediction` and `logits`. Where a measure is
undefined (one side does not vary, a class never occurs) it is 0 here, as in scikit-learn; scipy's correlations are NaN there.
Loss and perplexity are per labelled token. Of a judge's results a sample is a question with all its turns.

Legend: N = samples, C = classes, S = statistics.

All metrics there are, by name, in the order people read them: which an evaluation measures, and what it says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pipeline.core.errors import RecipeError
from pipeline.metrics.metric import Floats, Metric, SampleResult, mean_of, ratio, table
from pipeline.metrics.text import TEXT_METRICS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_POSITIVE = 1

# The kinds of evaluation (`evaluate.kind`).
_GENERATED = ("text", "answer")
_CLASSES, _VALUES = ("classification",), ("regression",)


def _one_hot(results: Sequence[SampleResult], field: str) -> Floats:
    """The class in a field of each result, as (N, C)."""
    import numpy as np

    classes = len(results[0]["logits"])
    numbers_N = np.array([int(result[field]) for result in results])
    return np.eye(classes)[numbers_N]


def _class_counts(results: Sequence[SampleResult]) -> Floats:
    """For each class whether it is rightly predicted, predicted, and true: (N, 3C)."""
    import numpy as np

    predicted_NC, true_NC = _one_hot(results, "prediction"), _one_hot(results, "label")
    return np.concatenate([predicted_NC * true_NC, predicted_NC, true_NC], axis=1)


def _f1_of_classes(sums: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """F1 of each class, and whether it occurs at all; the last axis becomes C."""
    import numpy as np

    right, predicted, true = np.split(sums, 3, axis=-1)
    occurs = predicted + true > 0
    return 2 * right / np.where(occurs, predicted + true, 1), occurs


def _f1(sums: Floats) -> Floats:
    scores: Floats = _f1_of_classes(sums)[0][..., _POSITIVE]
    return scores


def _f1_macro(sums: Floats) -> Floats:
    scores, occurs = _f1_of_classes(sums)
    mean: Floats = scores.sum(axis=-1) / occurs.sum(axis=-1)
    return mean


def _matthews(sums: Floats) -> Floats:
    import numpy as np

    right, predicted, true = np.split(sums, 3, axis=-1)
    count = true.sum(axis=-1)
    covariance = right.sum(axis=-1) * count - (predicted * true).sum(axis=-1)
    spread = (count**2 - (predicted**2).sum(axis=-1)) * (count**2 - (true**2).sum(axis=-1))
    return covariance / np.sqrt(np.where(spread > 0, spread, np.inf))


def _moments(values: Callable[[Sequence[SampleResult]], tuple[Floats, Floats]]) -> Callable[..., Floats]:
    """1, x, y, x^2, y^2 and xy of each sample: (N, 6)."""

    def statistics(results: Sequence[SampleResult]) -> Floats:
        import numpy as np

        x_N, y_N = values(results)
        return np.stack([np.ones_like(x_N), x_N, y_N, x_N**2, y_N**2, x_N * y_N], axis=1)

    return statistics


def _centred(results: Sequence[SampleResult]) -> tuple[Floats, Floats]:
    """Predictions and labels, less the labels' mean: squares of large values would lose their differences."""
    import numpy as np

    x_N, y_N = (np.array([float(result[field]) for result in results]) for field in ("prediction", "label"))
    return x_N - y_N.mean(), y_N - y_N.mean()


def _ranked(results: Sequence[SampleResult]) -> tuple[Floats, Floats]:
    """Ranks in the whole sample, equal values sharing the mean of theirs."""
    from scipy.stats import rankdata

    x_N, y_N = (rankdata(values_N) for values_N in _centred(results))
    return x_N - x_N.mean(), y_N - y_N.mean()


def _correlation(sums: Floats) -> Floats:
    import numpy as np

    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = (count * xx - x**2) * (count * yy - y**2)
    # Rounding leaves a trace of spread where there is none.
    varies = spread > 1e-24 * (count * xx) * (count * yy)
    return np.where(varies, (count * xy - x * y) / np.sqrt(np.where(varies, spread, 1)), 0.0)


LABEL_METRICS = (
    # F1 of class 1 means something only where there is one other.
    Metric("f1", "F1 of class 1", _class_counts, _f1, _CLASSES, best=1, classes=2),
    Metric("f1_macro", "F1, mean over classes", _class_counts, _f1_macro, _CLASSES, best=1),
    Metric("matthews", "Matthews correlation", _class_counts, _matthews, _CLASSES),
    Metric("pearson", "Pearson correlation", _moments(_centred), _correlation, _VALUES, decides=_VALUES),
    # Drawn samples keep the ranks they have in the whole sample; its interval is a good approximation, not the exact bootstrap.
    Metric("spearman", "Spearman correlation", _moments(_ranked), _correlation, _VALUES),
)

# exp of more is no number any more.
_LARGEST_LOSS = 700.0


def _losses(results: Sequence[SampleResult]) -> Floats:
    return table([(result["loss_sum"], float(result["tokens"])) for result in results])


def _perplexity(sums: Floats) -> Floats:
    import numpy as np

    return np.exp(np.minimum(ratio(sums), _LARGEST_LOSS))


CHOICE_METRICS = (
    Metric(
        "accuracy",
        "Accuracy",
        mean_of("accuracy"),
        ratio,
        ("choice", *_CLASSES),
        decides=("choice", *_CLASSES),
        best=1,
    ),
    Metric("accuracy_norm", "Accuracy, by length", mean_of("accuracy_norm"), ratio, ("choice",), best=1),
    # Measured with `evaluate.extract`.
    Metric(
        "accuracy_generated",
        "Accuracy, generated",
        mean_of("accuracy_generated"),
        ratio,
        ("choice",),
        by_default=False,
        best=1,
    ),
)

LANGUAGE_METRICS = (
    Metric(
        "loss",
        "Loss",
        _losses,
        ratio,
        (*_GENERATED, "choice", "loss", *_CLASSES, *_VALUES),
        decides=("loss",),
        lower_is_better=True,
    ),
    Metric("perplexity", "Perplexity", _losses, _perplexity, (*_GENERATED, "choice", "loss"), lower_is_better=True),
)

# Measured by `kasa judge`, in no evaluation of a run.
JUDGED_METRICS = (
    Metric("grade", "Grade", mean_of("grade"), ratio, (), best=10),
    Metric("win_rate", "Win rate", mean_of("won"), ratio, (), best=1),
)


METRICS = {
    metric.name: metric
    for metric in (*TEXT_METRICS, *CHOICE_METRICS, *LABEL_METRICS, *LANGUAGE_METRICS, *JUDGED_METRICS)
}
LOWER_IS_BETTER = frozenset(name for name, metric in METRICS.items() if metric.lower_is_better)
SHARES = frozenset(name for name, metric in METRICS.items() if metric.best == 1)


def of_text_alone() -> tuple[str, ...]:
    """The metrics of generated text, which `evaluate.metrics` can ask for."""
    return tuple(name for name, metric in METRICS.items() if metric.kinds == ("text",))


def measured(kind: str, asked: Collection[str] = ()) -> tuple[str, ...]:
    """The metrics of an evaluation of this kind, with those that the recipe asks for."""
    return tuple(
        name for name, metric in METRICS.items() if kind in metric.kinds and (metric.by_default or name in asked)
    )


def deciding(kind: str) -> str:
    """The metric on which promotion is decided, unless the recipe names another."""
    return next(name for name, metric in METRICS.items() if kind in metric.decides)


def metrics_for_classes(metrics: Sequence[str], classes: int) -> tuple[str, ...]:
    """Those of the metrics that mean something for so many classes; 0 stands for a head without classes."""
    return tuple(name for name in metrics if not classes or METRICS[name].classes in (None, classes))


def optional_packages(metrics: Iterable[str]) -> list[str]:
    """The packages of extras that compute some of the metrics, as far as they are installed here."""
    packages = {METRICS[name].package for name in metrics} - {""}
    return sorted(package for package in packages if find_spec(package) is not None)


def check_measurable(names: Iterable[str]) -> None:
    """Refuse metrics that this machine cannot measure: training should not run for nothing.

    Raises:
        RecipeError: naming what is missing.
    """
    for name in names:
        if lacking := METRICS[name].lacks():
            raise RecipeError(f"evaluate.metrics: {name} needs {lacking}; or leave {name} out")


def labels_of_text() -> str:
    """What is always measured of generated text, such as `BLEU, ROUGE-L and chrF`."""
    return _listed([METRICS[name].label for name in of_text_alone() if METRICS[name].by_default])


def optional_of_text() -> str:
    """What can be measured of generated text beside, with what it needs."""
    return ", ".join(
        f"`{name}`{f' (needs {_needs(name)})' if _needs(name) else ''}"
        for name in of_text_alone()
        if not METRICS[name].by_default
    )


def deciding_names() -> str:
    """What promotion is decided on by default, over all kinds."""
    return _listed([f"`{name}`" for name, metric in METRICS.items() if metric.decides], "or")


def scales() -> str:
    """From where to where the metrics of evaluations run, such as `accuracy` from 0 to 1."""
    names: dict[float, list[str]] = {}
    for name, metric in METRICS.items():
        if metric.kinds and metric.best is not None:
            names.setdefault(metric.best, []).append(f"`{name}`")
    return ", ".join(
        f"{_listed(several)} run{'s' * (len(several) == 1)} from 0 to {best:g}"
        for best, several in sorted(names.items())
    )


def _needs(name: str) -> str:
    metric = METRICS[name]
    return _listed([*(["Java"] if metric.java else []), *([f"the extra `{metric.extra}`"] if metric.extra else [])])


def _listed(names: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
