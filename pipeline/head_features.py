"""What a new head reads: before it is trained its answers say nothing of the base, the representation below it does.

Legend: B = samples, F = features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from pipeline.labelled_model import Sample, collate_labelled, head_outputs, padding_token
from pipeline.planning.model_shapes import head_modules


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
