"""Labels of texts: which classes a data set has, and what each label means to a new head.

`pipeline.data.forms` reads a label as the text that people would write for it. Here it becomes the number of a class or, for a
regression, a value.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kasa.errors import nearest
from pipeline.config.settings import HeadKind
from pipeline.core.errors import DataError
from pipeline.data.prepared import Rejection, Sample
from pipeline.models.chat import Message
from pipeline.models.prompting import Head

# The label of rows whose true label a benchmark does not publish.
UNLABELLED = "-1"
_CLASSES_SHOWN = 5
# Digits of the number of a class; Python refuses to read numbers of thousands of them.
_LONGEST_NUMBER = 10


@dataclass(frozen=True)
class Labels:
    """What the labels of one data set mean.

    Attributes:
        head: the head that learns them.
        named: whether the recipe names the classes. Then a label may be the name or the number of a class.
    """

    head: Head
    named: bool = False

    def read(self, sample: Sample) -> tuple[Sample, float] | Rejection:
        """The sample, with its class by name, and the number of the class or the value; or why it cannot be used."""
        label = sample.references[0]
        if self.head.kind == "regression":
            value = _number(label)
            if value is None:
                return Rejection(sample.location, f"label is not a number but {label!r}")
            return sample, value
        classes = self.head.classes
        if label in classes:
            return sample, classes.index(label)
        if label == UNLABELLED:
            return Rejection(sample.location, "label is -1: the row is not labelled")
        if self.named and label.isdecimal() and len(label) < _LONGEST_NUMBER and int(label) < len(classes):
            answer = Message("assistant", classes[int(label)])
            return dataclasses.replace(sample, turns=(*sample.turns[:-1], answer)), int(label)
        known = "data.labels" if self.named else "the training and held-out labels"
        return Rejection(sample.location, f"label {label!r} is none of {known}{nearest(label, classes)}")


def find_labels(kind: HeadKind, names: Sequence[str], samples: Sequence[Sample]) -> Labels:
    """What the labels mean to a head of this kind.

    Args:
        names: the classes that the recipe names; empty where the samples decide.
        samples: those of training and held-out data.

    Raises:
        DataError: there is one class only, or the labels are numbers or texts rather than classes.
    """
    pairs = any(sample.is_pair for sample in samples)
    if kind == "regression":
        return Labels(Head(kind, (), pairs))
    if names:
        return Labels(Head(kind, tuple(names), pairs), named=True)
    found = Counter(label for sample in samples if (label := sample.references[0]) != UNLABELLED)
    if samples and not found:
        raise DataError("every label is -1, which marks rows that are not labelled; name a labelled split")
    if len(found) > max(2, len(samples) / 2):
        hint = (
            "set base.head: regression" if all(_number(label) is not None for label in found) else "check data.columns"
        )
        raise DataError(
            f"the {len(samples)} rows have {len(found)} different labels, such as {_listed(found)}; those are no classes: {hint}"
        )
    return Labels(Head(kind, tuple(_in_order(found)), pairs))


def check_sides(head: Head, train: Sequence[float], heldout: Sequence[float]) -> None:
    """Refuse splits from which nothing can be learned or measured.

    Args:
        train, heldout: the number of the class or the value of each sample.

    Raises:
        DataError: one of the splits has only one class or value.
    """
    for side, values in (("training", train), ("held-out", heldout)):
        if side == "held-out" and head.kind == "classification":
            continue  # accuracy means something with one class too
        if len(set(values)) < 2:
            what = head.classes[int(values[0])] if head.kind == "classification" else f"{values[0]:g}"
            raise DataError(
                f"all {len(values)} {side} samples have the label {what}, so there is nothing to tell apart; add rows "
                "with other labels, or check data.columns"
            )


def label_summary(head: Head, values: Sequence[float]) -> dict[str, Any]:
    """How often each class occurs among the training samples, or the range of the values."""
    if head.kind == "classification":
        counts = Counter(int(value) for value in values)
        return {"train_labels": {name: counts[index] for index, name in enumerate(head.classes)}}
    return {"train_labels": {"least": min(values), "mean": sum(values) / len(values), "most": max(values)}}


def _in_order(labels: Iterable[str]) -> list[str]:
    """Sorted: numbers by size, names by the alphabet."""
    found = sorted(labels)
    if all(_number(label) is not None for label in found):
        found.sort(key=float)
    return found


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(repr(label) for label in list(labels)[:_CLASSES_SHOWN])
