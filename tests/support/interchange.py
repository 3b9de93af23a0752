"""Random adapters on whole models, and KaSA layers beside PEFT's and beside the formula in fp64.

Differences are the largest absolute one between two outputs, relative to the largest output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import kasa
from kasa import KasaConfig
from kasa.adapter_file import SavedAdapter
from kasa.checkpoint import weight_digest
from kasa.spectra import bottom_triplets
from kasa.targets import Target
from kasa.truncation import Truncation
from kasa.weighting import Weighting
from pipeline.models.base import BaseModel

RANK = 16
# The update's share of a weight's norm.
UPDATE_SHARE = 0.05

Outputs = list[torch.Tensor]


def difference(ours: Outputs, theirs: Outputs) -> float:
    """Return the largest absolute difference, relative to the largest value of `theirs`."""
    apart = max(float((one.double() - other.double()).abs().max()) for one, other in zip(ours, theirs, strict=True))
    return apart / max(float(other.abs().max()) for other in theirs)


def random_adapter(
    base: BaseModel, truncation: Truncation, weighting: Callable[[str], Weighting] | None = None
) -> SavedAdapter:
    """Adapt every linear weight: real dropped components, and an update of `UPDATE_SHARE` of the weight's norm."""
    config = KasaConfig(RANK, 2.0 * RANK, truncation=truncation, dropped_rank=RANK)
    targets = base.targets("all-linear")
    digests: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    dropped: dict[str, torch.Tensor] = {}
    for target in targets:
        weight_OI = base.weights.weight(target)
        triplets = bottom_triplets(weight_OI, RANK, target.name, weighting and weighting(target.name))
        left_OD, right_DI = triplets.dropped_factors(RANK)
        a_RI, d_R, b_OR = _random_update(weight_OI.float(), config.scale, seed=len(digests))
        digests[target.name] = weight_digest(weight_OI)
        tensors |= {f"{target.name}.a": a_RI, f"{target.name}.d": d_R, f"{target.name}.b": b_OR}
        dropped |= {f"{target.name}.dropped_left": left_OD, f"{target.name}.dropped_right": right_DI}
    return SavedAdapter(config, tuple(targets), str(base.folder), digests, tensors, dropped)


def layer_differences(weight_OI: torch.Tensor) -> dict[str, float]:
    """Compare one random adapter on one weight in four computations.

    Returns:
        `peft`: our layer to PEFT's in fp32. `fp32`: our layer to W x written out in fp64 with torch's own SVD. `fp64`:
        our layer in fp64 to the formula with the stored fp32 factors. `fp64_with_another_svd`: the same to torch's SVD,
        where the rounding of the stored factors shows. `peft_to_reference`: PEFT's layer to the formula.
    """
    weight_OI = weight_OI.float()
    target = Target("layer", *weight_OI.shape)
    config = KasaConfig(RANK, 2.0 * RANK, truncation="weight", dropped_rank=RANK)
    left_OD, right_DI = bottom_triplets(weight_OI, RANK).dropped_factors(RANK)
    a_RI, d_R, b_OR = _random_update(weight_OI, config.scale, seed=1)
    tensors = {"layer.a": a_RI, "layer.d": d_R, "layer.b": b_OR}
    dropped = {"layer.dropped_left": left_OD, "layer.dropped_right": right_DI}
    ours = _one_layer(weight_OI)
    kasa.attach_saved(ours, SavedAdapter(config, (target,), "", {}, tensors, dropped))
    x_BI = torch.randn(64, target.in_features, generator=_generator(0))
    x64_BI = x_BI.double()
    with torch.no_grad():
        y_BO = ours.get_submodule("layer")(x_BI)
        peft_BO = _peft_layer(weight_OI, tensors, config)(x_BI)
        y64_BO = ours.double().get_submodule("layer")(x64_BI)
    update_OI = config.scale * (b_OR.double() * d_R.double()) @ a_RI.double()
    kept_BO = x64_BI @ (weight_OI.double() + update_OI).T
    stored_BO = kept_BO - x64_BI @ (left_OD.double() @ right_DI.double()).T
    exact_BO = kept_BO - x64_BI @ _smallest_by_svd(weight_OI).T
    return {
        "peft": difference([y_BO], [peft_BO]),
        "fp32": difference([y_BO], [exact_BO]),
        "fp64": difference([y64_BO], [stored_BO]),
        "fp64_with_another_svd": difference([y64_BO], [exact_BO]),
        "peft_to_reference": difference([peft_BO], [exact_BO]),
    }


def _one_layer(weight_OI: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    model.layer.weight.data = weight_OI.clone()
    return model


def _peft_layer(weight_OI: torch.Tensor, tensors: dict[str, torch.Tensor], config: KasaConfig) -> nn.Module:
    from peft import KasaConfig as PeftKasaConfig
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=RANK, lora_alpha=int(config.alpha), target_modules=["layer"], kasa_config=PeftKasaConfig())
    layer: Any = inject_adapter_in_model(settings, _one_layer(weight_OI)).layer
    layer.lora_A["default"].weight.data = tensors["layer.a"].clone()
    layer.lora_diag["default"].data = tensors["layer.d"].clone()
    layer.lora_B["default"].weight.data = tensors["layer.b"].clone()
    return layer


def _random_update(weight_OI: torch.Tensor, scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = _generator(seed)
    rows, columns = weight_OI.shape
    a_RI = torch.randn(RANK, columns, generator=generator) / math.sqrt(columns)
    d_R = torch.randn(RANK, generator=generator)
    b_OR = torch.randn(rows, RANK, generator=generator)
    return a_RI, d_R, b_OR * (UPDATE_SHARE * weight_OI.norm() / (scale * (b_OR * d_R) @ a_RI).norm())


def _smallest_by_svd(weight_OI: torch.Tensor) -> torch.Tensor:
    left, values, right = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    return (left[:, -RANK:] * values[-RANK:]) @ right[-RANK:]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
