"""All metrics there are, by name, in the order people read them: which an evaluation measures, and what it says of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec

from pipeline.core.errors import RecipeError
from pipeline.metrics.scores import CHOICE_METRICS, JUDGED_METRICS, LABEL_METRICS, LANGUAGE_METRICS
from pipeline.metrics.text import TEXT_METRICS

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
