"""Batches for a causal language model, and the losses of their labelled tokens. Training and evaluation share them.

The samples of a forward pass are either padded on the left, one row each, or packed end to end into one row. The output
layer, which is large, runs only over the positions that predict a label.

Legend: B = rows, T = tokens, K = positions that predict a label, V = vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

IGNORED = -100

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Samples for one forward pass.

    Attributes:
        input_ids_BT, position_ids_BT: The model's inputs. Positions count from 0 in every sample.
        attention_mask_BT: 0 for padding. None for packed samples, which transformers separates by their positions.
        predicting_K: The positions whose logits predict a label in some row, ascending.
        labels_BK: The labels that these positions predict; `IGNORED` if there is none.
        token_count: The number of tokens that are not padding.
    """

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor | None
    predicting_K: torch.Tensor
    labels_BK: torch.Tensor
    token_count: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def collate(samples: Sequence[Sample], pad_token: int = 0) -> Batch:
    """Pad samples, which have `input_ids` and `labels`, on the left: one row each."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_token)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full((len(samples), longest), IGNORED)
    for row, sample in enumerate(samples):
        start = longest - len(sample["input_ids"])
        input_ids[row, start:] = torch.as_tensor(sample["input_ids"])
        labels[row, start:] = _labels(sample)
        mask[row, start:] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(input_ids, positions, mask, *_predicted(labels), token_count=int(mask.sum()))


def pack(samples: Sequence[Sample]) -> Batch:
    """Pack samples, which have `input_ids` and `labels`, end to end into one row. No token attends to another sample."""
    input_ids = torch.cat([torch.as_tensor(sample["input_ids"]) for sample in samples])
    positions = torch.cat([torch.arange(len(sample["input_ids"])) for sample in samples])
    labels = torch.cat([_labels(sample) for sample in samples])
    return Batch(input_ids[None], positions[None], None, *_predicted(labels[None]), token_count=len(input_ids))


def _labels(sample: Sample) -> torch.Tensor:
    labels = torch.tensor(sample["labels"])
    # Nothing precedes the first token, so nothing predicts it.
    labels[0] = IGNORED
    return labels


def _predicted(labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(`predicting_K`, `labels_BK`) of a batch. If it has no labels at all, one position without a label."""
    labelled_K = (labels_BT != IGNORED).any(dim=0).nonzero()[:, 0]
    if not len(labelled_K):
        labelled_K = torch.tensor([labels_BT.shape[1] - 1])
    return (labelled_K - 1).clamp(min=0), labels_BT[:, labelled_K]


def label_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross entropy of each label in nats, fp32, shape (B, K); zero where there is no label."""
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    if batch.attention_mask_BT is not None:
        inputs["attention_mask"] = batch.attention_mask_BT
    if limits_logits(model):
        logits_BKV = model(**inputs, logits_to_keep=batch.predicting_K).logits
    else:
        logits_BKV = model(**inputs).logits[:, batch.predicting_K]
    losses = functional.cross_entropy(
        logits_BKV.float().flatten(0, 1), batch.labels_BK.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(batch.labels_BK)


def vocabulary_size(model: nn.Module) -> int:
    """The size V of the model's vocabulary."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def limits_logits(model: nn.Module) -> bool:
    """Whether the model can compute the logits of selected positions only (`logits_to_keep`)."""
    inner = getattr(model, "module", model)
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
