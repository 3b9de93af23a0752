"""Estimates of a run before anything is fetched or started: parameters, steps, memory, FLOPs, time, disk.

`kasa plan` estimates from the base model's configuration alone, for any number of GPUs and every ZeRO stage. `kasa run
--dry-run` adds what this machine already has. Both return the same `Estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kasa.targets import Target, select_targets
from kasa.truncation import dropped_rank
from pipeline.apps.plan_compute import Hardware, SpectraCost, rows_to_train_on, spectra_cost, training_flops
from pipeline.apps.plan_memory import (
    GIB,
    AdaptedModule,
    BlockShape,
    ForwardPass,
    MemoryItem,
    Partitioning,
    base_parameters,
    block_shape,
    frozen_factor_parameters,
    trainable_parameters,
    worker_memory,
)
from pipeline.config.deepspeed import complete_config, config_names, load_deepspeed_config
from pipeline.config.recipe import Recipe
from pipeline.config.settings import TrainSettings
from pipeline.core.errors import BaseModelError, RecipeError
from pipeline.core.machine import memory_gib
from pipeline.data.forms import check_form
from pipeline.methods.choice import check_ranks
from pipeline.models.prompting import head_modules
from pipeline.models.shapes import base_outline, built_in_names, meta_model, model_config, position_count
from pipeline.run.preflight import check_lengths
from pipeline.training.job import optimizer_steps

if TYPE_CHECKING:
    from torch import nn

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2}

# Share of a GPU's memory that a plan may fill: the caching allocator leaves gaps.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class DataFacts:
    """The training split as far as it is known: number of rows, and tokens per row on average and at most."""

    rows: int
    mean_tokens: float
    longest_tokens: int


@dataclass(frozen=True)
class StageMemory:
    """Memory of one worker under one DeepSpeed configuration.

    Attributes:
        deepspeed: its name, as in `train.deepspeed`.
        zero_stage: its ZeRO stage.
        items: the uses of memory.
        fits: whether a GPU holds them with a tenth to spare; None where the GPU's memory is unknown.
        refused: why the pipeline refuses the configuration; None where it does not.
    """

    deepspeed: str
    zero_stage: int
    items: tuple[MemoryItem, ...]
    fits: bool | None = None
    refused: str | None = None

    @property
    def device_gib(self) -> float:
        """Memory that one worker needs where it computes: on its GPU, or on the host without one."""
        return sum(item.gib for item in self.items if not item.on_host)

    @property
    def host_gib(self) -> float:
        """Host memory that a worker with a GPU needs besides."""
        return sum(item.gib for item in self.items if item.on_host)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs. None stands for what cannot be known yet.

    Attributes:
        base_parameters: parameters of the base model.
        trainable_parameters: parameters of the adapters and of a new head.
        adapted_modules: modules that carry an adapter.
        frozen_factor_parameters: parameters of the dropped factors.
        gpu: whether workers have a GPU each.
        workers: number of training workers.
        global_batch: samples per optimizer step.
        micro_batch: samples per forward pass of one worker.
        gradient_accumulation: gradient accumulation steps; None where samples are packed, since their lengths decide.
        pack_tokens: most tokens in a forward pass of packed samples; None where samples are padded.
        row_tokens: tokens of the longest sample, which decide memory.
        mean_row_tokens: tokens of a sample on average, which decide time; of the longest where nothing else is known.
        train_rows: number of training samples; where the data is not prepared, what its files suggest.
        optimizer_steps: of the whole training; at most, where `train_rows` is not known.
        hardware: what it would run on.
        memory: of one worker under the recipe's own DeepSpeed configuration.
        stages: of one worker under each configuration of its family, the recipe's own included.
        activations_gib: activations under the recipe's own configuration without gradient checkpointing.
        activations_checkpointed_gib: the same with gradient checkpointing.
        step_flops: FLOPs of one optimizer step over all workers.
        checkpoint_gib: a checkpoint: adapter and Adam's moments in fp32.
        adapter_gib: the trained adapter as it is stored, with its dropped factors.
        spectra: what the decomposition costs.
        unknown: why something is None, one line each.
        warnings: why the run may fail, one line each.
    """

    base_parameters: int | None = None
    trainable_parameters: int | None = None
    adapted_modules: int | None = None
    frozen_factor_parameters: int | None = None
    gpu: bool
    workers: int
    global_batch: int
    micro_batch: int
    gradient_accumulation: int | None
    pack_tokens: int | None
    row_tokens: int
    mean_row_tokens: float
    train_rows: int | None
    optimizer_steps: int | None
    hardware: Hardware
    memory: StageMemory | None = None
    stages: tuple[StageMemory, ...] = ()
    activations_gib: float | None = None
    activations_checkpointed_gib: float | None = None
    step_flops: float | None = None
    checkpoint_gib: float | None = None
    adapter_gib: float | None = None
    spectra: SpectraCost | None = None
    unknown: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def trainable_share(self) -> float | None:
        """Trainable parameters as a share of the base's."""
        if self.trainable_parameters is None or not self.base_parameters:
            return None
        return self.trainable_parameters / self.base_parameters

    @property
    def step_seconds(self) -> float | None:
        """Seconds of one optimizer step at the hardware's utilisation."""
        if self.step_flops is None or self.hardware.peak_tflops is None:
            return None
        return self.step_flops / (self.workers * self.hardware.peak_tflops * 1e12 * self.hardware.utilisation)

    @property
    def training_seconds(self) -> float | None:
        """Seconds of all optimizer steps at the hardware's utilisation."""
        if self.step_seconds is None or self.optimizer_steps is None:
            return None
        return self.step_seconds * self.optimizer_steps

    @property
    def recommended(self) -> str | None:
        """The configuration with the lowest ZeRO stage that fits, since it communicates least."""
        return next((stage.deepspeed for stage in self.stages if stage.fits and not stage.refused), None)


def plan_training(recipe: Recipe, hardware: Hardware) -> Estimate:
    """Plan from the base model's configuration alone: a local folder, the hub cache, or a built-in shape.

    Raises:
        KasaError: the model's shape is unknown here, or the run itself would refuse the recipe.
    """
    if not recipe.adapter.spec.registrable:
        raise RecipeError(f"adapter.method {recipe.adapter.method}: what other methods than kasa need is not planned")
    check_form(recipe.data)
    config = model_config(recipe.base.model, recipe.base.revision)
    if config is None:
        raise BaseModelError(
            f"base.model {recipe.base.model}: its configuration is not on this machine; name a local folder with a "
            f"config.json, or one of {', '.join(built_in_names())}"
        )
    model = meta_model(config, recipe.base.head)
    if (positions := position_count(model)) is not None:
        check_lengths(recipe, positions)
    return estimate(recipe, model, checked_targets(recipe, model), hardware=hardware)


def checked_targets(recipe: Recipe, model: nn.Module) -> list[Target]:
    """The modules that would carry an adapter.

    Raises:
        TargetError: there are none, or the recipe's ranks are too large for one.
    """
    targets = select_targets(base_outline(model, recipe.base.head), recipe.adapter.targets)
    check_ranks(recipe, targets)
    return targets


def estimate(
    recipe: Recipe,
    model: nn.Module | None,
    targets: Sequence[Target],
    *,
    hardware: Hardware | None = None,
    data: DataFacts | None = None,
) -> Estimate:
    """Estimate a run.

    Args:
        recipe: the resolved recipe.
        model: the base on the meta device; None where its shape is unknown.
        targets: the modules of it that carry an adapter.
        hardware: where it would run.
        data: the training split, where it is prepared; else every row is taken to be as long as the recipe allows.

    Raises:
        RecipeError: the recipe's DeepSpeed configuration does not exist, or is refused.
    """
    train, hardware = recipe.train, hardware or Hardware()
    deepspeed = complete_config(load_deepspeed_config(train.deepspeed), train)
    rows = rows_to_train_on(recipe.data) if data is None else min(data.rows, recipe.data.train_rows or data.rows)
    longest = recipe.data.max_tokens if data is None else data.longest_tokens
    mean = float(longest) if data is None else data.mean_tokens
    shape = None if model is None else block_shape(getattr(model, "config", None))
    if shape is not None and recipe.base.head != "language-model":
        shape = replace(shape, vocabulary=0)  # a new head has a few outputs, not a vocabulary of logits
    of_model = {} if model is None else _of_model(recipe, model, shape, targets, longest, mean, hardware, deepspeed)
    accumulation = math.ceil(train.batch_size / (train.workers * train.micro_batch_size))
    return Estimate(
        gpu=train.gpu,
        workers=train.workers,
        global_batch=train.batch_size,
        micro_batch=train.micro_batch_size,
        gradient_accumulation=accumulation if train.pack_tokens is None else None,
        pack_tokens=train.pack_tokens,
        row_tokens=longest,
        mean_row_tokens=mean,
        train_rows=rows,
        optimizer_steps=train.max_steps if rows is None else optimizer_steps(train, rows),
        hardware=hardware,
        unknown=_unknown(recipe, model, shape, rows, hardware),
        warnings=() if model is None else _too_much(train, of_model["memory"]),
        **of_model,
    )


def _of_model(
    recipe: Recipe,
    model: nn.Module,
    shape: BlockShape | None,
    targets: Sequence[Target],
    longest: int,
    mean: float,
    hardware: Hardware,
    deepspeed: dict[str, Any],
) -> dict[str, Any]:
    """The fields of an `Estimate` that follow from the model: parameters, memory, FLOPs, disk and spectra."""
    train = recipe.train
    adapted = [
        AdaptedModule(target, recipe.adapter.rank, dropped_rank(target, recipe.adapter.truncation, recipe.dropped_rank))
        for target in targets
    ]
    trainable = trainable_parameters(adapted)
    if recipe.base.head != "language-model":
        trainable += sum(p.numel() for name in head_modules(model) for p in model.get_submodule(name).parameters())
    forward = _forward_pass(recipe, longest)

    def memory_of(name: str, config: dict[str, Any], **changes: bool) -> StageMemory:
        parts = Partitioning.from_config(config, train.workers)
        needs = replace(forward, **changes)
        items = worker_memory(model, shape, adapted, needs, parts, gpu=train.gpu, spectra_rank=recipe.spectra_rank)
        return _judged(StageMemory(name, parts.stage, items), recipe, hardware)

    def activations_gib(checkpointing: bool) -> float | None:
        items = memory_of(train.deepspeed, deepspeed, checkpointing=checkpointing).items
        return next((item.gib for item in items if item.kind == "activations"), None)

    frozen = frozen_factor_parameters(adapted)
    return {
        "base_parameters": base_parameters(model),
        "trainable_parameters": trainable,
        "adapted_modules": len(adapted),
        "frozen_factor_parameters": frozen,
        "memory": memory_of(train.deepspeed, deepspeed),
        "stages": tuple(memory_of(name, load_deepspeed_config(name)) for name in _family(recipe)),
        "activations_gib": activations_gib(False),
        "activations_checkpointed_gib": activations_gib(True),
        "step_flops": _step_flops(recipe, model, shape, adapted, mean),
        "checkpoint_gib": 3 * 4 * trainable / GIB,
        "adapter_gib": 4 * (trainable + frozen) / GIB,
        "spectra": spectra_cost(targets, recipe.spectra_rank, recipe.adapter.truncation) if recipe.decomposes else None,
    }


def _forward_pass(recipe: Recipe, longest: int) -> ForwardPass:
    train = recipe.train
    return ForwardPass(
        rows=train.micro_batch_size if train.pack_tokens is None else 1,
        row_tokens=train.pack_tokens or longest,
        masked=train.micro_batch_size > 1 or train.pack_tokens is not None,
        element_bytes=_ELEMENT_BYTES[train.precision],
        dropout_mask_bytes=_mask_bytes(recipe),
        checkpointing=train.gradient_checkpointing,
    )


def _family(recipe: Recipe) -> list[str]:
    """Names of the configurations to compare: stage 0, the recipe's own, and all for its kind of machine and number of workers."""
    kind, workers = "gpu_" if recipe.train.gpu else "cpu_", recipe.train.workers
    names = {"cpu_zero0", recipe.train.deepspeed, *(name for name in config_names() if name.startswith(kind))}
    all_parts = {name: Partitioning.from_config(load_deepspeed_config(name), workers) for name in names}
    fitting = {name: parts for name, parts in all_parts.items() if workers % parts.copy_workers == 0}

    def price(name: str) -> tuple[int, bool, bool, str]:
        parts = fitting[name]
        return parts.stage, parts.offload_optimizer, parts.offload_weights, name

    return sorted(fitting, key=price)


def _judged(memory: StageMemory, recipe: Recipe, hardware: Hardware) -> StageMemory:
    if memory.zero_stage == 0 and recipe.train.precision == "bf16":
        return replace(memory, refused="ZeRO stage 0 does not go with train.precision bf16")
    limit = hardware.gpu_memory_gib
    return replace(memory, fits=None if limit is None else memory.device_gib <= USABLE_SHARE * limit)


def _mask_bytes(recipe: Recipe) -> int:
    """Bytes of one element of a dropout mask: one on a GPU; on a CPU those of the activations' type."""
    if not recipe.adapter.dropout:
        return 0
    return 1 if recipe.train.gpu else _ELEMENT_BYTES[recipe.train.precision]


def _step_flops(
    recipe: Recipe, model: nn.Module | None, shape: BlockShape | None, adapted: Sequence[AdaptedModule], mean: float
) -> float | None:
    if model is None or shape is None:
        return None
    per_token = training_flops(model, shape, adapted, mean, checkpointing=recipe.train.gradient_checkpointing)
    return per_token * mean * recipe.train.batch_size


def _unknown(
    recipe: Recipe, model: nn.Module | None, shape: BlockShape | None, rows: int | None, hardware: Hardware
) -> tuple[str, ...]:
    reasons = []
    if model is None:
        reasons.append(f"parameters and memory: the shape of {recipe.base.model} is not on this machine")
    elif shape is None:
        reasons.append("activations, logits and FLOPs: the model's configuration does not name its block sizes")
    if rows is None:
        limit = recipe.train.max_steps
        what = f"whether the data is enough for {limit:,} optimizer steps" if limit else "optimizer steps"
        reasons.append(f"{what}: rows are counted when the data is prepared; data.train_rows=N limits them")
    if hardware.peak_tflops is None:
        reasons.append("time: name the GPU (kasa plan --gpu H100) or its peak (--peak-tflops)")
    return tuple(reasons)


def _too_much(train: TrainSettings, memory: StageMemory) -> tuple[str, ...]:
    """Without GPUs and cluster all workers share this machine's memory."""
    here = memory_gib()
    needed = memory.device_gib * train.workers
    if train.gpu or here is None or needed <= here[0]:
        return ()
    return (
        f"memory: {train.workers} worker{'s' if train.workers > 1 else ''} need {needed:.1f} GiB and this machine has "
        f"{here[0]:.1f}; use a cluster or GPUs, a smaller base, or a lower train.micro_batch_size or data.max_tokens",
    )
