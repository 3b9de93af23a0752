"""What a run will need, before anything is fetched or started: parameters, steps, memory, disk.

Pure functions of the recipe and the base model's shapes (`pipeline.model_shapes.meta_model`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pipeline.memory import (
    GIB,
    AdaptedModule,
    BlockShape,
    MemoryItem,
    activation_bytes,
    block_shape,
    gathered_bytes,
    logits_bytes,
    optimizer_bytes,
)
from pipeline.recipe import Recipe
from pipeline.training.batches import optimizer_steps

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Estimate:
    """What a recipe comes to. None stands for what cannot be known yet; `unknown` says why, one line each."""

    base_parameters: int | None
    trainable_parameters: int | None
    adapted_modules: int | None
    frozen_factor_parameters: int | None
    workers: int
    zero_stage: int
    global_batch: int
    micro_batch: int
    gradient_accumulation: int
    train_rows: int | None
    optimizer_steps: int | None
    checkpoint_gib: float | None
    activations_gib: float | None
    activations_checkpointed_gib: float | None
    memory: tuple[MemoryItem, ...]
    unknown: tuple[str, ...]

    @property
    def trainable_share(self) -> float | None:
        """Trainable parameters divided by the base's."""
        if self.trainable_parameters is None or not self.base_parameters:
            return None
        return self.trainable_parameters / self.base_parameters

    @property
    def device_gib(self) -> float | None:
        """GiB that one worker needs where it computes (its GPU, or host memory without one)."""
        return sum(item.gib for item in self.memory if not item.on_host) if self.memory else None

    @property
    def host_gib(self) -> float | None:
        """GiB that one worker offloads to host memory; 0 without offload."""
        return sum(item.gib for item in self.memory if item.on_host) if self.memory else None


def estimate(
    recipe: Recipe,
    model: nn.Module | None,
    adapted: Sequence[AdaptedModule],
    *,
    zero_stage: int,
    offload: bool,
    train_rows: int | None,
    offload_weights: bool = False,
) -> Estimate:
    """Estimate a run.

    Args:
        recipe: the resolved recipe.
        model: the base on the meta device; None where its shape is unknown.
        adapted: name, out features and in features of every module that carries an adapter.
        zero_stage: ZeRO stage of the DeepSpeed file, 0 to 3.
        offload: whether that file offloads the optimizer to host memory (its gradients go there too).
        train_rows: training samples after the split; None before the data was read.
        offload_weights: whether the file offloads the weights as well (stage 3).
    """
    train, rank = recipe.train, recipe.adapter.rank
    known = model is not None or bool(adapted)
    trainable = trainable_parameters(adapted, rank) if known else None
    factors = frozen_factor_parameters(adapted, recipe.dropped_rank) if known else None
    rows = None if train_rows is None else min(train_rows, recipe.data.train_rows or train_rows)
    shape = None if model is None else block_shape(getattr(model, "config", None))
    kept = {flag: _activations_gib(recipe, shape, adapted, zero_stage, flag) for flag in (False, True)}
    return Estimate(
        base_parameters=None if model is None else base_parameters(model),
        trainable_parameters=trainable,
        adapted_modules=len(adapted) if known else None,
        frozen_factor_parameters=factors,
        workers=train.workers,
        zero_stage=zero_stage,
        global_batch=train.batch_size,
        micro_batch=train.micro_batch_size,
        gradient_accumulation=train.batch_size // (train.workers * train.micro_batch_size),
        train_rows=rows,
        optimizer_steps=None if rows is None else optimizer_steps(train, rows),
        checkpoint_gib=None if trainable is None else 3 * 4 * trainable / GIB,
        activations_gib=kept[False],
        activations_checkpointed_gib=kept[True],
        memory=()
        if model is None
        else (
            *_weights(
                recipe,
                model,
                trainable=trainable or 0,
                factors=factors or 0,
                zero_stage=zero_stage,
                on_host=offload_weights,
            ),
            *_training_state(recipe, trainable or 0, zero_stage, offload),
            *_working_memory(recipe, shape, kept[train.gradient_checkpointing]),
        ),
        unknown=_unknown(recipe, model, shape, rows),
    )


def base_parameters(model: nn.Module) -> int:
    """Parameters of the base; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trainable_parameters(adapted: Sequence[AdaptedModule], rank: int) -> int:
    """Parameters of A (r x in), d (r) and B (out x r) over all modules: sum of r (in + out) + r."""
    return sum(rank * (in_features + out_features) + rank for _, out_features, in_features in adapted)


def frozen_factor_parameters(adapted: Sequence[AdaptedModule], dropped_rank: int) -> int:
    """Elements of the frozen pairs U_d S_d (out x D) and V_d^T (D x in): sum of D (in + out)."""
    return sum(dropped_rank * (in_features + out_features) for _, out_features, in_features in adapted)


def _weights(
    recipe: Recipe, model: nn.Module, *, trainable: int, factors: int, zero_stage: int, on_host: bool
) -> list[MemoryItem]:
    element_bytes = _ELEMENT_BYTES[recipe.train.precision]
    share = recipe.train.workers if zero_stage == 3 else 1
    items = [MemoryItem("base weights", element_bytes * base_parameters(model) / share / GIB, on_host)]
    if zero_stage == 3:
        items.append(MemoryItem("weights gathered by ZeRO-3", gathered_bytes(model, element_bytes) / GIB))
    # Undivided also under ZeRO-3: most adapter tensors lie below the persistence threshold, and none is large.
    items.append(MemoryItem("adapter", element_bytes * trainable / GIB, on_host))
    items.append(MemoryItem("frozen truncation factors", element_bytes * factors / GIB, on_host))
    return items


def _training_state(recipe: Recipe, trainable: int, zero_stage: int, on_host: bool) -> list[MemoryItem]:
    train = recipe.train
    element_bytes = _ELEMENT_BYTES[train.precision]
    share = train.workers if zero_stage >= 2 else 1
    states = optimizer_bytes(trainable, zero_stage, element_bytes, train.workers)
    return [
        MemoryItem("gradients", element_bytes * trainable / share / GIB, on_host),
        MemoryItem("optimizer states", states / GIB, on_host),
    ]


def _working_memory(recipe: Recipe, shape: BlockShape | None, activations_gib: float | None) -> list[MemoryItem]:
    if shape is None or activations_gib is None:
        return []
    logits = logits_bytes(shape.vocabulary, _tokens(recipe), _ELEMENT_BYTES[recipe.train.precision])
    return [MemoryItem("activations", activations_gib), MemoryItem("logits", logits / GIB)]


def _activations_gib(
    recipe: Recipe, shape: BlockShape | None, adapted: Sequence[AdaptedModule], zero_stage: int, checkpointing: bool
) -> float | None:
    if shape is None:
        return None
    element_bytes = _ELEMENT_BYTES[recipe.train.precision]
    mask_bytes = 1 if recipe.train.gpu else element_bytes
    kept = activation_bytes(
        shape,
        adapted,
        tokens=_tokens(recipe),
        element_bytes=element_bytes,
        rank=recipe.adapter.rank,
        mask_bytes=mask_bytes if recipe.adapter.dropout else 0,
        checkpointing=checkpointing,
        zero_stage=zero_stage,
    )
    return kept / GIB


def _tokens(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size * recipe.data.max_tokens


def _unknown(recipe: Recipe, model: nn.Module | None, shape: BlockShape | None, rows: int | None) -> tuple[str, ...]:
    reasons = []
    if model is None:
        reasons.append(f"parameters and memory: the shape of {recipe.base.model} is not on this machine")
    elif shape is None:
        reasons.append("activations and logits: the model's configuration does not name its block sizes")
    if rows is None:
        reasons.append("optimizer steps: the training rows are counted when the data is prepared")
    return tuple(reasons)
