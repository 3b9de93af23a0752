"""Loading the base model with its weights and its head.

Batches for a causal language model, and the losses of their labelled tokens. Training and evaluation share them.

The samples of a forward pass are either padded on the left, one row each, or packed end to end into one row. The output
layer, which is large, runs only over the positions that predict a label.

Legend: B = rows, T = tokens, K = positions that predict a label, V = vocabulary.

Batches for a model with a new head, the losses of their samples, and the features that the head reads.

Training and evaluation share the batches and losses. Samples are padded on the right, as encoders expect. Truncation of the
base looks at the features, because the outputs of a head that is not trained yet say nothing about the base.

Legend: B = samples, T = tokens, C = outputs of the head, F = features.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline.core.errors import BaseModelError
from pipeline.models.prompting import LANGUAGE_MODEL, Head, head_modules

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_base(folder: Path, precision: str, head: Head = LANGUAGE_MODEL, seed: int = 0) -> nn.Module:
    """Load the model in evaluation mode, on the CPU, or partitioned if an `HfDeepSpeedConfig` for ZeRO-3 is alive.

    A new head is initialised from the seed, whatever the checkpoint holds. It stays in fp32, because a value or a ranking of
    logits needs more than the eight bits of a bf16 mantissa, and takes inputs of any floating type.

    Args:
        precision: `fp32` or `bf16`.
        seed: Seeds the initial weights of a new head.

    Raises:
        BaseModelError: The checkpoint lacks weights of the body, or transformers has no such head for the model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if head.is_new:
        return _with_new_head(folder, precision, head, seed)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[precision], attn_implementation="sdpa", local_files_only=True
    )


def _with_new_head(folder: Path, precision: str, head: Head, seed: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would explain at length that the head is new
    classes = head.classes or ("value",)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=DTYPES[precision],
            local_files_only=True,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: index for index, name in enumerate(classes)},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    names = head_modules(model)
    for key in sorted(loading["missing_keys"]):
        if key.partition(".")[0] not in names:
            raise BaseModelError(
                f"{folder} holds no weights for {key}, so part of the body would be random; use a complete checkpoint"
            )
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = model.config.eos_token_id
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    for name in names:
        _initialise(model.get_submodule(name), name, seed, float(getattr(model.config, "initializer_range", 0.02)))
    return model


def _initialise(module: nn.Module, name: str, seed: int, spread: float) -> None:
    """Give a module fp32 parameters as transformers initialises them: weights normal, biases 0, scales of norms 1.

    Each parameter is drawn from a generator of its own, so its values do not depend on what else the head has.
    """
    for path, parameter in list(module.named_parameters()):
        # Under ZeRO-3 the parameter is empty. Its replacement has its full shape until the engine partitions it.
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        owner, attribute = module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if attribute == "bias":
            fresh = torch.zeros(shape)
        elif len(shape) < 2:
            fresh = torch.ones(shape)
        else:
            fresh = torch.normal(0.0, spread, shape, generator=_generator(seed, f"{name}.{path}"))
        setattr(owner, attribute, nn.Parameter(fresh))
    module.register_forward_pre_hook(_in_its_own_type)


def _in_its_own_type(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in arguments
    )


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


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
