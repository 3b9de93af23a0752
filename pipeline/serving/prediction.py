"""A model with a trained head that labels texts: what `kasa generate`, the registry's models and the evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.methods.loading import attach_folder
from pipeline.models.heads import PAIR_SEPARATOR, Head
from pipeline.models.loading import load_base
from pipeline.models.prompting import encode_texts, load_tokenizer
from pipeline.models.sequence_classification import Sample, collate_labelled, head_outputs, padding_token

_TEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class Prediction:
    """The label of a text: a class by name with the probability of each, or a value."""

    label: str | float
    probabilities: dict[str, float]

    def __str__(self) -> str:
        return self.label if isinstance(self.label, str) else f"{self.label:.6g}"


@dataclass(frozen=True)
class Predictor:
    """A loaded model, its tokenizer, and what its outputs mean."""

    model: nn.Module
    tokenizer: Any
    head: Head

    def predictions(self, texts: Sequence[str]) -> list[Prediction]:
        """The labels of texts, of pairs with `PAIR_SEPARATOR` between them, tokenised as in training."""
        samples = [encode_texts(self.tokenizer, self._parts(text)) for text in texts]
        found = []
        for start in range(0, len(samples), _TEXTS_AT_ONCE):
            found += [self._said(row_C) for row_C in self.outputs(samples[start : start + _TEXTS_AT_ONCE])]
        return found

    @torch.inference_mode()
    def outputs(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The head's outputs for tokenised samples, fp32, on the CPU, shape (samples, outputs)."""
        batch = collate_labelled(samples, padding_token(self.model)).to(next(self.model.parameters()).device)
        return head_outputs(self.model, batch).cpu()

    def _parts(self, text: str) -> list[str]:
        return text.split(PAIR_SEPARATOR, 1) if self.head.pairs else [text]

    def _said(self, outputs_C: torch.Tensor) -> Prediction:
        if self.head.kind == "regression":
            return Prediction(float(outputs_C[0]), {})
        shares = outputs_C.double().softmax(dim=0).tolist()
        classes = self.head.classes
        return Prediction(classes[int(outputs_C.argmax())], dict(zip(classes, shares, strict=True)))


def load_predictor(base: Path, adapter: Path | None, precision: str, head: Head, seed: int = 0) -> Predictor:
    """Load a base model with a head, on the GPU if there is one: the adapter's, or an untrained one drawn from the seed.

    Raises:
        AdapterFileError: the adapter is damaged, or made for another architecture.
    """
    model = load_base(base, precision, head, seed)
    if adapter:
        attach_folder(model, adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Predictor(model, load_tokenizer(base), head)
