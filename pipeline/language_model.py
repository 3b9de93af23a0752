"""Batches for a causal language model, and the loss of each sample's labelled tokens; training and evaluation share it.

Samples are padded on the left, so that the labelled completions end together and the (large) output layer runs over
that tail alone.

Legend: B = samples, T = tokens, K = labelled tail.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Left-padded samples.

    Attributes:
        input_ids_BT, attention_mask_BT, position_ids_BT: the model's inputs.
        labels_BK: labels of the last K positions; `IGNORED` where there is none.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BK: torch.Tensor

    @property
    def token_count(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask_BT.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def collate(samples: Sequence[Mapping[str, Any]], pad_token: int = 0) -> Batch:
    """Pad samples with `input_ids` and `labels` on the left."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_token)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full((len(samples), longest), IGNORED)
    for row, sample in enumerate(samples):
        start = longest - len(sample["input_ids"])
        input_ids[row, start:] = torch.as_tensor(sample["input_ids"])
        labels[row, start:] = torch.as_tensor(sample["labels"])
        # The first token has nothing before it to be predicted from.
        labels[row, start] = IGNORED
        mask[row, start:] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    labelled = (labels != IGNORED).any(dim=0).nonzero()
    tail = longest - int(labelled[0]) if len(labelled) else 1
    return Batch(input_ids, mask, positions, labels[:, -tail:])


def label_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy of each label in nats, fp32, shape (B, K); zero where there is no label.

    The logits that predict the K labels are those of the K positions before them.
    """
    keep = batch.labels_BK.shape[1] + 1
    inputs = {
        "input_ids": batch.input_ids_BT,
        "attention_mask": batch.attention_mask_BT,
        "position_ids": batch.position_ids_BT,
        "use_cache": False,
    }
    if _limits_logits(model):
        inputs["logits_to_keep"] = keep
    logits_BKV = model(**inputs).logits[:, -keep:-1].float()
    losses = functional.cross_entropy(
        logits_BKV.flatten(0, 1), batch.labels_BK.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(batch.labels_BK)


def _limits_logits(model: nn.Module) -> bool:
    inner = getattr(model, "module", model)
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
