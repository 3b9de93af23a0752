"""How far a merged model is from its base with the adapter: their logits, in fp32, on a few texts.

Legend: T = tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kasa import attach_saved
from kasa.adapter_file import SavedAdapter
from pipeline.core.errors import BaseModelError
from pipeline.core.machine import GIB, memory_gib
from pipeline.models.base import BaseModel
from pipeline.models.loading import load_base
from pipeline.models.prompting import load_tokenizer

# Prose, code, a question and digits, for bases with a tokenizer.
TEXTS = (
    "The river rises in the hills north of the town and reaches the sea after ninety miles.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: Which of the two is heavier, a litre of water or a litre of oil?\nAnswer:",
    "In 1969, 4 of the 12 members voted against; the motion was carried all the same.",
)
_RANDOM_TOKENS = 32
# Memory for activations, logits and the framework, as a multiple of the weights'.
_MEMORY_FACTOR = 1.25
# Share of the largest logit above which a merged model no longer says what the trained one says.
_COARSE = 0.01


@dataclass(frozen=True)
class LogitDifference:
    """How far two models are apart.

    Attributes:
        largest: the largest absolute difference between their logits.
        largest_logit: the largest absolute logit of the first.
    """

    largest: float
    largest_logit: float


def logit_difference(base: Path, adapter: SavedAdapter, merged: Path) -> LogitDifference:
    """Compare a base with its adapter and the merged folder, both in fp32, on a few texts."""
    sequences = text_sequences(base)
    model = load_base(base, "fp32")
    attach_saved(model, adapter)
    before = logits_of(model, sequences)
    del model
    after = logits_of(load_base(merged, "fp32"), sequences)
    return LogitDifference(
        max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True)),
        max(float(one.abs().max()) for one in before),
    )


def text_sequences(base: Path) -> list[torch.Tensor]:
    """Tokenised texts of shape (1, T); random tokens where the base has no tokenizer."""
    try:
        tokenizer = load_tokenizer(base)
    except BaseModelError:
        vocabulary = BaseModel("", base).config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocabulary, (1, _RANDOM_TOKENS), generator=generator) for _ in TEXTS]
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]


@torch.inference_mode()
def logits_of(model: nn.Module, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The model's logits, of shape (1, T, vocabulary), sequence by sequence."""
    model.eval()
    return [model(input_ids=ids).logits for ids in sequences]


def too_large(parameters: int) -> str | None:
    """Why a model of so many parameters cannot be compared on this machine; None where it can."""
    needed = parameters * 4 / GIB * _MEMORY_FACTOR
    memory = memory_gib()
    if memory is None or memory[1] >= needed:
        return None
    return f"logits not compared: that takes {needed:.0f} GiB of memory, {memory[1]:.0f} are free"


def coarse(logits: LogitDifference, dtypes: tuple[str, ...]) -> str | None:
    """A remark for the user where rounding the merged weights moved the logits by more than one percent, else None."""
    if dtypes == ("float32",) or logits.largest <= _COARSE * logits.largest_logit:
        return None
    return (
        f"rounding the merged weights to {', '.join(dtypes)} changes what the model says; --dtype fp32 and --format lora "
        "keep it"
    )
