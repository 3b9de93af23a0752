"""The hardware that a run is planned for, the arithmetic of the run, and how long it takes, from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kasa import find_targets
from kasa.errors import KasaError
from kasa.targets import Target
from kasa.truncation import CALIBRATED, LANCZOS_FROM, Truncation
from pipeline.apps.plan_memory import GIB, AdaptedModule, BlockShape
from pipeline.config.deepspeed import config_names
from pipeline.config.recipe import Recipe, parse_recipe, plain_values
from pipeline.config.settings import DataSettings
from pipeline.core.errors import RecipeError
from pipeline.data.readers import read_rows
from pipeline.data.sources import resolve_source

if TYPE_CHECKING:
    from torch import nn

# FLOPs per second in fp64 on one core, by the count below; 25e9 to 55e9 were measured on an AMD EPYC for sides of 1024 to 4096.
SPECTRA_FLOPS_PER_CORE = 3e10


# Larger data would make a plan slow.
_COUNTED_BYTES = 2**30


@dataclass(frozen=True)
class Hardware:
    """The hardware of one training worker.

    Attributes:
        gpu_memory_gib: memory of its GPU; None leaves open what fits.
        peak_tflops: its peak in the recipe's precision; None leaves the time open.
        utilisation: the share of the peak that training reaches.
    """

    gpu_memory_gib: float | None = None
    peak_tflops: float | None = None
    utilisation: float = 0.4


def hardware_of(
    recipe: Recipe,
    gpus: int | None,
    nodes: int,
    gpu: str | None,
    gpu_memory_gib: float | None,
    peak_tflops: float | None,
    utilisation: float,
) -> tuple[Recipe, Hardware]:
    """The recipe on as many GPUs as the options of `kasa plan` name, and the hardware that they describe.

    Args:
        recipe: the resolved recipe.
        gpus: GPUs on each node; None keeps the recipe's workers.
        nodes: number of nodes.
        gpu: name of the GPU, which sets its memory and peak.
        gpu_memory_gib: memory of one GPU, if it is not that of the name.
        peak_tflops: peak of one worker, if it is not that of the name.
        utilisation: the share of the peak that training reaches.

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
    """A GPU by its name, upper or lower case.

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


def _on_gpus(recipe: Recipe, gpus: int, nodes: int) -> Recipe:
    """The recipe with a worker for each GPU; a `cpu_...` configuration becomes its `gpu_...` counterpart."""
    values = plain_values(recipe)
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


def rows_to_train_on(data: DataSettings) -> int | None:
    """About how many training samples the recipe comes to, by the rows of its local files; None where they cannot be counted.

    Rows that are rejected, held out by hash or hold several samples are not looked at, so the true number may differ a little.
    """
    counts = [_rows_of(entry) for entry in data.train]
    if any(count is None for count in counts):
        return data.train_rows
    rows = float(sum(count for count in counts if count is not None))
    if not data.heldout:
        rows *= 1 - data.heldout_share
    rows = max(1, round(rows) - (data.validation_rows or 0))
    return min(rows, data.train_rows or rows)


def _rows_of(entry: str) -> int | None:
    """The rows of one entry of `data.train` that lies on this machine."""
    try:
        files = resolve_source(entry, "data.train", Path(), fetch=False) if "://" not in entry else None
        if files is None or sum(file.stat().st_size for file in files) > _COUNTED_BYTES:
            return None
        return sum(map(_count, files))
    except (KasaError, OSError, ValueError):  # pyarrow's are ValueErrors
        return None  # the run says what is wrong with it


def _count(file: Path) -> int:
    """The rows of a file; of formats with one on a line the lines, of parquet what it says itself."""
    match file.suffix.lower():
        case ".parquet":
            import pyarrow.parquet

            return int(pyarrow.parquet.read_metadata(file).num_rows)
        case ".jsonl" | ".txt":
            with file.open("rb") as lines:
                return sum(1 for line in lines if line.strip())
    return sum(1 for _ in read_rows(file))


@dataclass(frozen=True)
class Accelerator:
    """A GPU: its dense bf16 peak by the vendor's data sheet, and the memory that torch finds on it, rounded down."""

    name: str
    bf16_tflops: float
    memory_gib: float


ACCELERATORS = {
    accelerator.name.lower(): accelerator
    for accelerator in (
        Accelerator("A10", 125, 22),
        Accelerator("A100-40GB", 312, 39),
        Accelerator("A100-80GB", 312, 79),
        Accelerator("H100", 989, 79),
        Accelerator("H200", 989, 139),
        Accelerator("L4", 121, 22),
        Accelerator("L40S", 362, 44),
        Accelerator("RTX-4090", 165, 23),
    )
}


@dataclass(frozen=True)
class SpectraCost:
    """The cost of the spectra stage.

    Attributes:
        weights: number of weights.
        flops: FLOPs for all weights.
        core_seconds: seconds for all weights on one core; weights are independent, so cores divide it.
        task_gib: host memory of the largest weight's task.
        calibration_gib: fp32 covariances of all layer inputs, and of output gradients where the rule needs them, which each
            calibration worker holds beside the base; 0 where truncation depends on weights alone.
    """

    weights: int
    flops: float
    core_seconds: float
    task_gib: float
    calibration_gib: float


def training_flops(
    model: nn.Module, shape: BlockShape, adapted: Sequence[AdaptedModule], row_tokens: float, *, checkpointing: bool
) -> float:
    """FLOPs of one token's forward and backward pass, in rows of `row_tokens` tokens.

    Forward: 2 per weight of a linear module, 2 (r + D)(in + out) per adapter, 4 T q per layer for attention without
    regard to causality. Backward: the same for the gradients of activations (attention twice that), and 2 r (in + out)
    for the adapter's own; frozen weights have none. Checkpointing runs the blocks' forward pass once more. Regularisers
    do not depend on tokens and are left out.
    """
    linear = 2.0 * sum(target.out_features * target.in_features for target in find_targets(model, "all-linear"))
    head = 2.0 * shape.vocabulary * shape.hidden
    adapters = sum(2.0 * (module.rank + module.dropped) * module.features for module in adapted)
    own_gradients = sum(2.0 * module.rank * module.features for module in adapted)
    attention = 4.0 * row_tokens * shape.query * shape.layers
    blocks = linear + adapters + attention
    backward = linear + adapters + 2 * attention + own_gradients
    return blocks + backward + 2 * head + (blocks if checkpointing else 0.0)


def spectra_cost(targets: Sequence[Target], rank: int, truncation: Truncation) -> SpectraCost:
    """FLOPs, time and memory of `kasa.bottom_triplets` over all targets, in fp64.

    For a weight with sides K <= L: 2 K^2 L for the Gram matrix; for its eigenproblem 4/3 K^3, or 2/3 K^3 where two Cholesky
    factors, of the inverse and of the proof, stand in for it; 2 R K (K + 3 L) for the vectors, the projection and the
    certificate. Weighting takes 2 O I^2 + I^3 / 3 for the inputs, 2 O^2 I + O^3 / 3 for the gradients.
    """
    shapes = Counter((target.out_features, target.in_features) for target in targets)
    flops = sum(count * _triplets_flops(*shape, rank, truncation) for shape, count in shapes.items())
    return SpectraCost(
        weights=len(targets),
        flops=flops,
        core_seconds=flops / SPECTRA_FLOPS_PER_CORE,
        task_gib=max((_triplets_bytes(*shape, truncation) for shape in shapes), default=0) / GIB,
        calibration_gib=_covariance_bytes(targets, truncation) / GIB,
    )


def _weighted_sides(out_features: int, in_features: int, truncation: Truncation) -> list[int]:
    """The sides of a weight whose covariance a rule needs; that of the gradients only where it is no larger."""
    if truncation not in CALIBRATED:
        return []
    gradients = truncation == "loss" and out_features <= in_features
    return [in_features, out_features] if gradients else [in_features]


def _triplets_flops(out_features: int, in_features: int, rank: int, truncation: Truncation) -> float:
    k, length = sorted((out_features, in_features))
    sides = _weighted_sides(out_features, in_features, truncation)
    weighting = sum(2.0 * out_features * in_features * side + side**3 / 3 for side in sides)
    eigenproblem = (4 / 3 if k < LANCZOS_FROM else 2 / 3) * k**3
    return 2.0 * k * k * length + eigenproblem + 2.0 * rank * k * (k + 3 * length) + weighting


def _triplets_bytes(out_features: int, in_features: int, truncation: Truncation) -> int:
    """Bytes of the fp64 weight and its Gram matrix (twice, for the solver); with weighting also the weighted weight, and each
    covariance in fp32, in fp64, shifted, and its root."""
    k = min(out_features, in_features)
    weight = 8 * out_features * in_features
    sides = _weighted_sides(out_features, in_features, truncation)
    return weight * (2 if sides else 1) + 16 * k * k + sum((4 + 3 * 8) * side**2 for side in sides)


def _covariance_bytes(targets: Sequence[Target], truncation: Truncation) -> int:
    """fp32 bytes of one I x I matrix for each distinct input, and one O x O matrix for each weight whose gradients count."""
    sides = [_weighted_sides(target.out_features, target.in_features, truncation) for target in targets]
    inputs = {_input_of(target): side[0] for target, side in zip(targets, sides, strict=True) if side}
    return 4 * sum(side**2 for side in [*inputs.values(), *(gradient for side in sides for gradient in side[1:])])


def _input_of(target: Target) -> tuple[str, bool, int]:
    """A key that modules with the same input share. The attention's output is no input of q, k or v."""
    parent, _, name = target.name.rpartition(".")
    return parent, name == "o_proj", target.in_features
