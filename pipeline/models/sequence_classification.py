"""Batches for a model with a new head, and the loss of each sample; training and evaluation share it.

Samples are padded on the right, as encoders have it.

Legend: B = samples, T = tokens, C = outputs of the head.

What a new head reads: before it is trained its answers say nothing of the base, the representation below it does.

Legend: B = samples, F = features.
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

from pipeline.models.heads import Head, head_modules

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class LabelledBatch:
    """Samples for one forward pass.

    Attributes:
        inputs: the model's inputs by name, each (B, T).
        labels_B: number of the class, or value; NaN where there is none. fp64.
        token_count: tokens that are not padding.
    """

    inputs: dict[str, torch.Tensor]
    labels_B: torch.Tensor
    token_count: int

    def to(self, device: torch.device) -> LabelledBatch:
        """The same batch on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=moved, labels_B=self.labels_B.to(device))


def collate_labelled(samples: Sequence[Sample], pad_token: int) -> LabelledBatch:
    """Pad samples with `input_ids`, perhaps `token_type_ids`, and perhaps a `label`: a row each.

    Args:
        samples: at least one.
        pad_token: the model's own (`padding_token`): some models count positions, or look for a text's end, by it.
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
    """The token that the model takes for padding."""
    config: Any = model.config
    return int(config.pad_token_id)


def head_outputs(model: nn.Module, batch: LabelledBatch) -> torch.Tensor:
    """The head's outputs, fp32, shape (B, C): a logit for each class, or the value alone."""
    known = inspect.signature(getattr(model, "module", model).forward).parameters
    # Some tokenizers tell the texts of a pair apart for models that do not.
    logits_BC: torch.Tensor = model(**{name: ids_BT for name, ids_BT in batch.inputs.items() if name in known}).logits
    return logits_BC.float()


def sample_losses(outputs_BC: torch.Tensor, labels_B: torch.Tensor, head: Head) -> torch.Tensor:
    """Cross entropy in nats, or squared error, of each sample; shape (B,), zero where there is no label."""
    known_B = labels_B.isfinite()
    labels_B = labels_B.nan_to_num()
    if head.kind == "classification":
        losses_B = functional.cross_entropy(outputs_BC, labels_B.long(), reduction="none")
    else:
        losses_B = (outputs_BC[:, 0] - labels_B.to(outputs_BC.dtype)).square()
    return losses_B * known_B


def features(model: nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
    """What the last linear module of the head reads of samples of one length, fp32, shape (B, F)."""
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
    """The sum of the features under random signs, each sample's own: its gradients have, on average, the second moments of
    those of all features. The signs depend on the text alone, whatever worker reads it."""
    signs = np.stack([_signs(sample, features_BF.shape[1]) for sample in samples])
    return (features_BF * torch.from_numpy(signs).to(features_BF)).sum()


def _signs(sample: Sample, count: int) -> np.ndarray:
    digest = hashlib.blake2b(np.asarray(sample["input_ids"], np.int64).tobytes(), digest_size=8).digest()
    return 2.0 * np.random.default_rng(int.from_bytes(digest, "big")).integers(0, 2, count) - 1.0


def read_samples(model: nn.Module, batches: Sequence[Sequence[Sample]], gradients: bool) -> Iterator[int]:
    """Run samples through the model, and with `gradients` a probe of their features backward; the tokens of each pass."""
    for batch in batches:
        with torch.set_grad_enabled(gradients):
            features_BF = features(model, batch)
        if gradients:
            probe(features_BF, batch).backward()
        yield sum(len(sample["input_ids"]) for sample in batch)


def changed_share(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """The energy of the difference as a share of that of `before`; both batch by batch."""
    before, after = ([one_BF.detach() for one_BF in side] for side in (before, after))
    change = sum(float((old_BF - new_BF).double().square().sum()) for old_BF, new_BF in zip(before, after, strict=True))
    return change / sum(float(old_BF.double().square().sum()) for old_BF in before)
