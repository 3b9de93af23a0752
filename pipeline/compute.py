"""How much arithmetic a run takes, and how long that lasts, from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from kasa import Target, find_targets
from pipeline.memory import GIB, AdaptedModule, BlockShape

# fp64 on one core, in FLOPs per second, the eigenproblem of a 4096 x 4096 weight included: 8.9e9 measured on an AMD EPYC
# whose other core was busy; the check `spectra-model` reaches three times that on the small weights of SmolLM2.
SPECTRA_FLOPS_PER_CORE = 9e9


@dataclass(frozen=True)
class Accelerator:
    """A GPU: dense bf16 peak by its vendor's data sheet, and the memory that torch finds on it, rounded down."""

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
    """What the spectra stage takes.

    Attributes:
        core_seconds: for all weights, on one core; weights are independent, so cores divide it.
        task_gib: host memory of the largest weight's task.
        calibration_gib: covariances of all layer inputs, fp32, which each calibration worker holds beside the base; 0
            where truncation looks at weights alone.
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


def spectra_cost(targets: Sequence[Target], rank: int, *, calibrated: bool) -> SpectraCost:
    """FLOPs, time and memory of `kasa.bottom_triplets` over all targets, in fp64.

    For a weight with sides K <= L: 2 K^2 L for the Gram matrix, 4/3 K^3 for its eigenproblem, 2 R K (K + 3 L) for
    the vectors, the projection and the certificate; with a covariance 2 O I^2 + I^3 / 3 more.
    """
    shapes = Counter((target.out_features, target.in_features) for target in targets)
    flops = sum(count * _triplets_flops(*shape, rank, calibrated) for shape, count in shapes.items())
    return SpectraCost(
        weights=len(targets),
        flops=flops,
        core_seconds=flops / SPECTRA_FLOPS_PER_CORE,
        task_gib=max((_triplets_bytes(*shape, calibrated) for shape in shapes), default=0) / GIB,
        calibration_gib=_covariance_bytes(targets) / GIB if calibrated else 0.0,
    )


def _triplets_flops(out_features: int, in_features: int, rank: int, calibrated: bool) -> float:
    k, length = sorted((out_features, in_features))
    weighting = 2.0 * out_features * in_features**2 + in_features**3 / 3 if calibrated else 0.0
    return 2.0 * k * k * length + 4 / 3 * k**3 + 2.0 * rank * k * (k + 3 * length) + weighting


def _triplets_bytes(out_features: int, in_features: int, calibrated: bool) -> int:
    """The fp64 weight and Gram matrix, the latter twice for the eigensolver; the weight before and after weighting, the
    covariance in fp32 and fp64, shifted, and its root."""
    k = min(out_features, in_features)
    weight = 8 * out_features * in_features
    return weight + 16 * k * k + (weight + (4 + 3 * 8) * in_features**2 if calibrated else 0)


def _covariance_bytes(targets: Iterable[Target]) -> int:
    """fp32, one I x I matrix for each distinct input; the attention's output is no input of q, k or v."""
    inputs = {_input_of(target) for target in targets}
    return sum(4 * width**2 for _, _, width in inputs)


def _input_of(target: Target) -> tuple[str, bool, int]:
    parent, _, name = target.name.rpartition(".")
    return parent, name == "o_proj", target.in_features
