"""What a run will need, before anything is fetched or started: parameters, steps, memory, FLOPs, time, disk.

`kasa plan` answers from the base model's configuration alone, for any number of GPUs and every ZeRO stage; `kasa run
--dry-run` adds what this machine has already. Both make the same `Estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kasa.targets import Target, select_targets
from kasa.truncation import dropped_rank
from pipeline.apps.planning.compute import ACCELERATORS, Accelerator, SpectraCost, spectra_cost, training_flops
from pipeline.apps.planning.memory import (
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
from pipeline.config.recipe import Recipe, parse_recipe, recipe_values
from pipeline.core.errors import BaseModelError, RecipeError
from pipeline.data.forms import check_form
from pipeline.methods.choice import check_ranks
from pipeline.models.heads import head_modules
from pipeline.models.shapes import base_outline, built_in_names, meta_model, model_config
from pipeline.training.batches import optimizer_steps

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2}

# Of a GPU's memory: what the caching allocator leaves in gaps.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Hardware:
    """What training would run on.

    Attributes:
        gpu_memory_gib: of one GPU; None leaves open what fits.
        peak_tflops: of one worker, in the recipe's precision; None leaves the time open.
        utilisation: the share of the peak that is reached.
    """

    gpu_memory_gib: float | None = None
    peak_tflops: float | None = None
    utilisation: float = 0.4


@dataclass(frozen=True)
class DataFacts:
    """What is known of the training split: rows, and tokens of a row on average and at most."""

    rows: int
    mean_tokens: float
    longest_tokens: int


@dataclass(frozen=True)
class StageMemory:
    """Memory of one worker under one DeepSpeed configuration.

    Attributes:
        deepspeed: its name, as `train.deepspeed` has it.
        fits: whether a GPU holds it with a tenth to spare; None where the GPU's memory is unknown.
        refused: why the pipeline does not train so; None where it does.
    """

    deepspeed: str
    zero_stage: int
    items: tuple[MemoryItem, ...]
    fits: bool | None = None
    refused: str | None = None

    @property
    def device_gib(self) -> float:
        """GiB that one worker needs where it computes (its GPU, or host memory without one)."""
        return sum(item.gib for item in self.items if not item.on_host)

    @property
    def host_gib(self) -> float:
        """GiB of host memory that a worker with a GPU needs besides."""
        return sum(item.gib for item in self.items if item.on_host)


@dataclass(frozen=True)
class Estimate:
    """What a recipe comes to. None stands for what cannot be known yet; `unknown` says why, one line each.

    Attributes:
        gradient_accumulation: passes in a step; None where samples are packed, for their lengths decide.
        pack_tokens: tokens of a pass of packed samples; None where they are padded.
        row_tokens: tokens of the longest sample, which decides memory.
        mean_row_tokens: tokens of a sample on average, which decides time; the longest where nothing else is known.
        memory: under the recipe's own DeepSpeed configuration.
        stages: under each configuration of its family, the recipe's own included.
        activations_gib, activations_checkpointed_gib: under the recipe's own, without and with gradient checkpointing.
        step_flops: of one optimizer step over all workers.
        checkpoint_gib: adapter and Adam's moments, fp32.
        adapter_gib: the trained adapter as it is stored, with its dropped factors.
    """

    base_parameters: int | None
    trainable_parameters: int | None
    adapted_modules: int | None
    frozen_factor_parameters: int | None
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
    memory: StageMemory | None
    stages: tuple[StageMemory, ...]
    activations_gib: float | None
    activations_checkpointed_gib: float | None
    step_flops: float | None
    checkpoint_gib: float | None
    adapter_gib: float | None
    spectra: SpectraCost | None
    unknown: tuple[str, ...]

    @property
    def trainable_share(self) -> float | None:
        """Trainable parameters divided by the base's."""
        if self.trainable_parameters is None or not self.base_parameters:
            return None
        return self.trainable_parameters / self.base_parameters

    @property
    def step_seconds(self) -> float | None:
        """One optimizer step at the hardware's utilisation."""
        if self.step_flops is None or self.hardware.peak_tflops is None:
            return None
        return self.step_flops / (self.workers * self.hardware.peak_tflops * 1e12 * self.hardware.utilisation)

    @property
    def training_seconds(self) -> float | None:
        """All optimizer steps at the hardware's utilisation."""
        if self.step_seconds is None or self.optimizer_steps is None:
            return None
        return self.step_seconds * self.optimizer_steps

    @property
    def recommended(self) -> str | None:
        """The configuration with the lowest ZeRO stage that fits: it communicates least."""
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
    return estimate(recipe, model, checked_targets(recipe, model), hardware=hardware)


def checked_targets(recipe: Recipe, model: nn.Module) -> list[Target]:
    """The modules that would carry an adapter.

    Raises:
        TargetError: there are none, or the recipe's ranks are too large for one.
    """
    targets = select_targets(base_outline(model, recipe.base.head), recipe.adapter.targets)
    check_ranks(recipe, targets)
    return targets


def hardware_of(
    recipe: Recipe,
    gpus: int | None,
    nodes: int,
    gpu: str | None,
    gpu_memory_gib: float | None,
    peak_tflops: float | None,
    utilisation: float,
) -> tuple[Recipe, Hardware]:
    """What the options of `kasa plan` mean: the recipe on that many GPUs, and what they can do.

    Raises:
        RecipeError: the options contradict one another or the recipe, or name an unknown GPU.
    """
    if gpus is None and nodes > 1:
        raise RecipeError(f"--nodes {nodes} needs --gpus, the number of GPUs on each")
    if gpus is not None:
        recipe = _on_gpus(recipe, gpus, nodes)
    if not recipe.train.gpu and (gpu or gpu_memory_gib):
        raise RecipeError("the recipe trains without GPUs; give --gpus N or train.gpu=true")
    known = find_accelerator(gpu) if gpu else None
    if known and recipe.train.precision == "bf16":
        peak_tflops = peak_tflops or known.bf16_tflops
    memory_gib = gpu_memory_gib or (known.memory_gib if known else None)
    return recipe, Hardware(memory_gib, peak_tflops, utilisation)


def find_accelerator(name: str) -> Accelerator:
    """A GPU by its name, in any case.

    Raises:
        RecipeError: it is not in the table.
    """
    found = ACCELERATORS.get(name.lower())
    if found is None:
        names = ", ".join(accelerator.name for accelerator in ACCELERATORS.values())
        raise RecipeError(
            f"--gpu {name!r} is not in the table ({names}); give --gpu-memory-gib and --peak-tflops instead"
        )
    return found


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
        RecipeError: the recipe's DeepSpeed configuration is none, or is refused.
    """
    train, hardware = recipe.train, hardware or Hardware()
    own = complete_config(load_deepspeed_config(train.deepspeed), train)
    rows = recipe.data.train_rows if data is None else min(data.rows, recipe.data.train_rows or data.rows)
    longest = recipe.data.max_tokens if data is None else data.longest_tokens
    mean = float(longest) if data is None else data.mean_tokens
    adapted = [
        AdaptedModule(target, recipe.adapter.rank, dropped_rank(target, recipe.adapter.truncation, recipe.dropped_rank))
        for target in targets
    ]
    shape = None if model is None else block_shape(getattr(model, "config", None))
    trainable = trainable_parameters(adapted)
    if model is not None and recipe.base.head != "language-model":
        # A new head has a few outputs, not a vocabulary of logits, and is trained whole.
        shape = None if shape is None else replace(shape, vocabulary=0)
        trainable += sum(p.numel() for name in head_modules(model) for p in model.get_submodule(name).parameters())
    known = model is not None
    forward = ForwardPass(
        rows=train.micro_batch_size if train.pack_tokens is None else 1,
        row_tokens=train.pack_tokens or longest,
        masked=train.micro_batch_size > 1 or train.pack_tokens is not None,
        element_bytes=_ELEMENT_BYTES[train.precision],
        dropout_mask_bytes=_mask_bytes(recipe),
        checkpointing=train.gradient_checkpointing,
    )

    def memory_of(
        name: str, config: dict[str, Any], *, checkpointing: bool = train.gradient_checkpointing
    ) -> StageMemory:
        assert model is not None
        parts = Partitioning.from_config(config, train.workers)
        needs = replace(forward, checkpointing=checkpointing)
        items = worker_memory(model, shape, adapted, needs, parts, gpu=train.gpu, spectra_rank=recipe.spectra_rank)
        return _judged(StageMemory(name, parts.stage, items), recipe, hardware)

    return Estimate(
        base_parameters=base_parameters(model) if model is not None else None,
        trainable_parameters=trainable if known else None,
        adapted_modules=len(adapted) if known else None,
        frozen_factor_parameters=frozen_factor_parameters(adapted) if known else None,
        gpu=train.gpu,
        workers=train.workers,
        global_batch=train.batch_size,
        micro_batch=train.micro_batch_size,
        gradient_accumulation=(
            math.ceil(train.batch_size / (train.workers * train.micro_batch_size))
            if train.pack_tokens is None
            else None
        ),
        pack_tokens=train.pack_tokens,
        row_tokens=longest,
        mean_row_tokens=mean,
        train_rows=rows,
        optimizer_steps=None if rows is None else optimizer_steps(train, rows),
        hardware=hardware,
        memory=memory_of(train.deepspeed, own) if known else None,
        stages=tuple(memory_of(name, load_deepspeed_config(name)) for name in _family(recipe)) if known else (),
        activations_gib=_activations_gib(memory_of(train.deepspeed, own, checkpointing=False)) if known else None,
        activations_checkpointed_gib=(
            _activations_gib(memory_of(train.deepspeed, own, checkpointing=True)) if known else None
        ),
        step_flops=_step_flops(recipe, model, shape, adapted, mean),
        checkpoint_gib=3 * 4 * trainable / GIB if known else None,
        adapter_gib=4 * (trainable + frozen_factor_parameters(adapted)) / GIB if known else None,
        spectra=spectra_cost(targets, recipe.spectra_rank, recipe.adapter.truncation) if known else None,
        unknown=_unknown(recipe, model, shape, rows, hardware),
    )


def _on_gpus(recipe: Recipe, gpus: int, nodes: int) -> Recipe:
    """The recipe with a worker for each GPU; a `cpu_...` configuration becomes its `gpu_...` counterpart."""
    values = recipe_values(recipe)
    deepspeed = recipe.train.deepspeed
    counterpart = deepspeed.replace("cpu_", "gpu_", 1)
    values["train"] |= {
        "gpu": True,
        "workers": gpus * nodes,
        "deepspeed": counterpart if counterpart in config_names() else deepspeed,
    }
    if "precision" not in recipe.train.model_fields_set:
        values["train"]["precision"] = "auto"
    return parse_recipe(values, f"--gpus {gpus} --nodes {nodes}")


def _family(recipe: Recipe) -> list[str]:
    """The configurations to compare: stage 0, the recipe's own, and all made for its kind of machine and so many workers."""
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
        return replace(memory, refused="not with train.precision bf16")
    limit = hardware.gpu_memory_gib
    return replace(memory, fits=None if limit is None else memory.device_gib <= USABLE_SHARE * limit)


def _mask_bytes(recipe: Recipe) -> int:
    """Of a dropout mask's element: a byte on a GPU; on a CPU masks have the type of the data."""
    if not recipe.adapter.dropout:
        return 0
    return 1 if recipe.train.gpu else _ELEMENT_BYTES[recipe.train.precision]


def _activations_gib(memory: StageMemory) -> float | None:
    return next((item.gib for item in memory.items if item.kind == "activations"), None)


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
        reasons.append("optimizer steps: rows are counted when the data is prepared; data.train_rows=N limits them")
    if hardware.peak_tflops is None:
        reasons.append("time: name the GPU (kasa plan --gpu H100) or its peak (--peak-tflops)")
    return tuple(reasons)
