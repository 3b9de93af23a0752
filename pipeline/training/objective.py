"""The training objective: the loss of a language model's labelled tokens, or that of a new head's labels.

The loss of a step is the sum of all losses in the global batch divided by their number.
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

# A loss has exploded above so many times the loss of a guess. A batch has few labels of a head, so their mean varies more.
_TOKENS_EXPLODED, _LABELS_EXPLODED = 2.0, 50.0


class Objective(Protocol):
    """How samples become batches, and which losses they have."""

    def count(self, sample: Sample) -> int:
        """The number of losses of a sample."""

    def without_labels(self, sample: Sample) -> Sample:
        """The same sample without any loss."""

    def batch(self, samples: Sequence[Sample], packed: bool) -> Any:
        """Collate samples for one forward pass, padded or packed."""

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The losses of a batch, of any shape; zero where there is none."""

    @property
    def largest_loss(self) -> tuple[float, float]:
        """(mean loss above which training has diverged, mean loss of a guess)."""


@dataclass(frozen=True)
class TokenObjective:
    """Cross entropy of a language model's labelled tokens.

    Attributes:
        vocabulary: number of tokens in the vocabulary.
    """

    vocabulary: int

    def count(self, sample: Sample) -> int:
        """The number of labelled tokens. The first has nothing before it to be predicted from."""
        return sum(label >= 0 for label in sample["labels"][1:])

    def without_labels(self, sample: Sample) -> Sample:
        """The same tokens without labels."""
        return {**sample, "labels": [IGNORED] * len(sample["labels"])}

    def batch(self, samples: Sequence[Sample], packed: bool) -> Batch:
        """Collate samples, padded on the left or packed."""
        return pack(samples) if packed else collate(samples)

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross entropy in nats, shape (rows, positions with labels)."""
        return label_losses(model, batch)

    @property
    def largest_loss(self) -> tuple[float, float]:
        """(limit, loss of a uniform guess, which is the logarithm of the vocabulary's size)."""
        guessing = math.log(self.vocabulary)
        return _TOKENS_EXPLODED * guessing, guessing


@dataclass(frozen=True)
class LabelObjective:
    """Cross entropy or squared error of a new head's outputs.

    Attributes:
        head: the head.
        pad_token: the model's padding token.
        guessing: mean loss of a guess that ignores the text.
    """

    head: Head
    pad_token: int
    guessing: float

    def count(self, sample: Sample) -> int:
        """One label per sample."""
        return 1

    def without_labels(self, sample: Sample) -> Sample:
        """The same text with NaN as its label, which `sample_losses` counts as zero loss."""
        return {**sample, "label": math.nan}

    def batch(self, samples: Sequence[Sample], packed: bool) -> LabelledBatch:
        """Collate samples, padded on the right."""
        assert not packed, "recipes refuse it"
        return collate_labelled(samples, self.pad_token)

    def losses(self, model: nn.Module, batch: LabelledBatch) -> torch.Tensor:
        """Cross entropy in nats or squared error, shape (samples,)."""
        return sample_losses(head_outputs(model, batch), batch.labels_B, self.head)

    @property
    def largest_loss(self) -> tuple[float, float]:
        """(limit, loss of a guess)."""
        return _LABELS_EXPLODED * self.guessing, self.guessing


def objective_of(model: nn.Module, head: Head, samples: Any) -> Objective:
    """The objective of a model with this head on these training samples."""
    if not head.is_new:
        return TokenObjective(vocabulary_size(model))
    # A uniform guess of the class; for values 0, which is what an untrained head answers on average.
    guessing = (
        math.log(head.outputs)
        if head.kind == "classification"
        else sum(label**2 for label in samples["label"]) / len(samples)
    )
    return LabelObjective(head, padding_token(model), guessing)
