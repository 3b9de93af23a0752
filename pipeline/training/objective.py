"""What a training minimises: the loss of a language model's labelled tokens, or that of a new head's labels.

Whatever is counted, a step's loss is the sum over the global batch divided by the count over the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.models.heads import Head
from pipeline.models.language_model import IGNORED, Batch, collate, label_losses, pack, vocabulary_size
from pipeline.models.sequence_classification import (
    LabelledBatch,
    collate_labelled,
    head_outputs,
    padding_token,
    sample_losses,
)

Sample = Mapping[str, Any]

# From so many times the loss of guessing on, a loss has exploded. Of a head's few labels a small batch says less.
_TOKENS_EXPLODED, _LABELS_EXPLODED = 2.0, 50.0


class Objective(Protocol):
    """How samples become batches, and what is summed up and counted in them."""

    def count(self, sample: Sample) -> int:
        """How many losses the sample has."""

    def without_labels(self, sample: Sample) -> Sample:
        """The same input without any loss."""

    def batch(self, samples: Sequence[Sample], packed: bool) -> Any:
        """A forward pass over the samples: padded, or packed where that is possible."""

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The losses in the batch, of any shape; zero where there is none."""

    @property
    def largest_loss(self) -> tuple[float, float]:
        """The mean loss that counts as exploded, and that of guessing."""


@dataclass(frozen=True)
class TokenObjective:
    """Cross entropy of a language model's labelled tokens, of a vocabulary of so many."""

    vocabulary: int

    def count(self, sample: Sample) -> int:
        """Labelled tokens."""
        return sum(label >= 0 for label in sample["labels"][1:])

    def without_labels(self, sample: Sample) -> Sample:
        """No token is labelled."""
        return {**sample, "labels": [IGNORED] * len(sample["labels"])}

    def batch(self, samples: Sequence[Sample], packed: bool) -> Batch:
        """Padded on the left, or packed."""
        return pack(samples) if packed else collate(samples)

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """In nats, of shape (rows, positions with labels)."""
        return label_losses(model, batch)

    @property
    def largest_loss(self) -> tuple[float, float]:
        """Guessing costs the logarithm of the vocabulary's size."""
        guessing = math.log(self.vocabulary)
        return _TOKENS_EXPLODED * guessing, guessing


@dataclass(frozen=True)
class LabelObjective:
    """Cross entropy or squared error of a new head's answers; `guessing` is the loss without looking at the text."""

    head: Head
    pad_token: int
    guessing: float

    def count(self, sample: Sample) -> int:
        """One label a sample."""
        return 1

    def without_labels(self, sample: Sample) -> Sample:
        """A label that is none."""
        return {**sample, "label": math.nan}

    def batch(self, samples: Sequence[Sample], packed: bool) -> LabelledBatch:
        """Padded on the right."""
        assert not packed, "recipes refuse it"
        return collate_labelled(samples, self.pad_token)

    def losses(self, model: nn.Module, batch: LabelledBatch) -> torch.Tensor:
        """In nats, or the label's unit squared, of shape (samples,)."""
        return sample_losses(head_outputs(model, batch), batch.labels_B, self.head)

    @property
    def largest_loss(self) -> tuple[float, float]:
        """Many times that of guessing."""
        return _LABELS_EXPLODED * self.guessing, self.guessing


def objective_of(model: nn.Module, head: Head, samples: Any) -> Objective:
    """What to minimise on these training samples."""
    if not head.is_new:
        return TokenObjective(vocabulary_size(model))
    # Of classes a uniform guess, of values 0, which is what a new head says.
    guessing = (
        math.log(head.outputs)
        if head.kind == "classification"
        else sum(label**2 for label in samples["label"]) / len(samples)
    )
    return LabelObjective(head, padding_token(model), guessing)
