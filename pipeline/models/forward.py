"""Batches for a base model, and the losses of their samples.

Training, evaluation and truncation share them. For a causal language model the samples of a forward pass are either padded
on the left, one row each, or packed end to end into one row; the output layer, which is large, runs only over the positions
that predict a label. For a model with a new head samples are padded on the right, as encoders expect. Truncation of its base
looks at the features that the head reads, because the outputs of an untrained head say nothing about the base.

Legend: B = rows or samples, T = tokens, K = positions that predict a label, V = vocabulary, C = outputs of a new head,
F = features.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline.models.prompting import Head, head_modules

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


@dataclass(frozen=True)
class LabelledBatch:
    """Samples for one forward pass.

    Attributes:
        inputs: The model's inputs by name, each of shape (B, T).
        labels_B: The number of the class, or the value; NaN where there is none. fp64.
        token_count: The number of tokens that are not padding.
    """

    inputs: dict[str, torch.Tensor]
    labels_B: torch.Tensor
    token_count: int

    def to(self, device: torch.device) -> LabelledBatch:
        """The same batch on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=moved, labels_B=self.labels_B.to(device))


def collate_labelled(samples: Sequence[Sample], pad_token: int) -> LabelledBatch:
    """Pad samples on the right: one row each.

    Args:
        samples: At least one. Each has `input_ids`, and may have `token_type_ids` and a `label`.
        pad_token: The model's own (`padding_token`). Some models count positions, or find the end of a text, by it.
    """
    longest = max(len(sample["input_ids"]) for sample in samples)
    input_ids_BT = torch.full((len(samples), longest), pad_token)
    mask_BT, types_BT = torch.zeros_like(input_ids_BT), torch.zeros_like(input_ids_BT)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        input_ids_BT[row, :length] = torch.as_tensor(sample["input_ids"])
        mask_BT[row, :length] = 1
        if types := sample.get("token_type_ids", ()):
            types_BT[row, :length] = torch.as_tensor(types)
    inputs = {"input_ids": input_ids_BT, "attention_mask": mask_BT}
    if any(sample.get("token_type_ids", ()) for sample in samples):
        inputs["token_type_ids"] = types_BT
    labels_B = torch.tensor([sample.get("label", torch.nan) for sample in samples], dtype=torch.float64)
    return LabelledBatch(inputs, labels_B, token_count=int(mask_BT.sum()))


def padding_token(model: nn.Module) -> int:
    """The id of the token that the model takes for padding."""
    config: Any = model.config
    return int(config.pad_token_id)


def head_outputs(model: nn.Module, batch: LabelledBatch) -> torch.Tensor:
    """The outputs of the head, fp32, shape (B, C): one logit for each class, or one value."""
    known = inspect.signature(getattr(model, "module", model).forward).parameters
    # Some tokenizers give token types for models that take none.
    logits_BC: torch.Tensor = model(**{name: ids_BT for name, ids_BT in batch.inputs.items() if name in known}).logits
    return logits_BC.float()


def sample_losses(outputs_BC: torch.Tensor, labels_B: torch.Tensor, head: Head) -> torch.Tensor:
    """The cross entropy in nats, or the squared error, of each sample; shape (B,), zero where there is no label."""
    known_B = labels_B.isfinite()
    labels_B = labels_B.nan_to_num()
    if head.kind == "classification":
        losses_B = functional.cross_entropy(outputs_BC, labels_B.long(), reduction="none")
    else:
        losses_B = (outputs_BC[:, 0] - labels_B.to(outputs_BC.dtype)).square()
    return losses_B * known_B


def features(model: nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
    """The inputs of the last linear module of the head for samples of one length, fp32, shape (B, F)."""
    inside = [module for name in head_modules(model) for module in model.get_submodule(name).modules()]
    last = [module for module in inside if isinstance(module, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        head_outputs(model, collate_labelled(samples, padding_token(model)).to(next(model.parameters()).device))
    finally:
        hook.remove()
    return seen[0].flatten(1).float()


def probe(features_BF: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """The sum of the features, each multiplied by a random sign.

    On average the gradients of this sum have the second moments of the gradients of all features. The signs of a sample
    depend on its tokens only, so it does not matter which worker reads it.
    """
    signs = np.stack([_signs(sample, features_BF.shape[1]) for sample in samples])
    return (features_BF * torch.from_numpy(signs).to(features_BF)).sum()


def _signs(sample: Sample, count: int) -> np.ndarray:
    digest = hashlib.blake2b(np.asarray(sample["input_ids"], np.int64).tobytes(), digest_size=8).digest()
    return 2.0 * np.random.default_rng(int.from_bytes(digest, "big")).integers(0, 2, count) - 1.0


def read_samples(model: nn.Module, batches: Sequence[Sequence[Sample]], gradients: bool) -> Iterator[int]:
    """Run batches through the model, and with `gradients` a probe of their features backward. Yields each pass's token count."""
    for batch in batches:
        with torch.set_grad_enabled(gradients):
            features_BF = features(model, batch)
        if gradients:
            probe(features_BF, batch).backward()
        yield sum(len(sample["input_ids"]) for sample in batch)


def changed_share(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """The squared norm of the change of the features, relative to that of `before`. Both are given batch by batch."""
    before, after = ([one_BF.detach() for one_BF in side] for side in (before, after))
    change = sum(float((old_BF - new_BF).double().square().sum()) for old_BF, new_BF in zip(before, after, strict=True))
    return change / sum(float(old_BF.double().square().sum()) for old_BF in before)
