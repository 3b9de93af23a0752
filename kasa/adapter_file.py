"""Adapters on disk. A saved adapter carries its dropped factors, so loading one does no SVD."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kasa.adapter import adapted_layers, attach, load_tensors
from kasa.checkpoint import CheckpointWeights, weight_digest
from kasa.config import KasaConfig
from kasa.errors import AdapterFileError
from kasa.folders import read_tensor_folder, write_tensor_folder
from kasa.layer import FROZEN
from kasa.targets import Target

ADAPTER_JSON = "adapter.json"


@dataclass(frozen=True)
class SavedAdapter:
    """All of an adapter but the base model.

    Attributes:
        config: the hyperparameters it was trained with.
        targets: the adapted modules.
        base: where the base model came from, for people to read.
        weight_digests: layer name -> digest of the base weight the adapter belongs to.
        tensors: `LAYER.a`, `LAYER.d`, `LAYER.b`, trained, fp32.
        dropped: `LAYER.dropped_left`, `LAYER.dropped_right`, fp32; empty when nothing is dropped.
    """

    config: KasaConfig
    targets: tuple[Target, ...]
    base: str
    weight_digests: dict[str, str]
    tensors: dict[str, torch.Tensor]
    dropped: dict[str, torch.Tensor]


def save_adapter(folder: Path, adapter: SavedAdapter) -> None:
    """Write the adapter as `tensors.safetensors` and `adapter.json`, complete or not at all."""
    facts = {
        "format": 1,
        "method": "KaSA (arXiv 2412.06071)",
        "base": adapter.base,
        "config": dataclasses.asdict(adapter.config),
        "targets": [dataclasses.asdict(target) for target in adapter.targets],
        "weight_digests": adapter.weight_digests,
    }
    write_tensor_folder(folder, ADAPTER_JSON, facts, {**adapter.tensors, **adapter.dropped})


def read_adapter(folder: Path) -> SavedAdapter:
    """Read a saved adapter.

    Raises:
        AdapterFileError: the folder is no adapter, incomplete or damaged.
    """
    facts, tensors = read_tensor_folder(folder, ADAPTER_JSON)
    dropped = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] in FROZEN}
    try:
        return SavedAdapter(
            config=KasaConfig(**facts["config"]),
            targets=tuple(Target(**target) for target in facts["targets"]),
            base=facts["base"],
            weight_digests=facts["weight_digests"],
            tensors={name: tensor for name, tensor in tensors.items() if name not in dropped},
            dropped=dropped,
        )
    except (KeyError, TypeError) as error:
        raise AdapterFileError(f"{folder / ADAPTER_JSON} is damaged or of another version: {error}") from None


def attach_saved(model: nn.Module, adapter: SavedAdapter) -> None:
    """Attach a saved adapter to its base model; no SVD is done.

    Raises:
        AdapterFileError: the model has no such modules, or they are of another shape.
        TargetError: the model already carries an adapter.
    """
    for target in adapter.targets:
        _check_module(model, target)
    attach(model, adapter.targets, dataclasses.replace(adapter.config, truncation="none"))
    for name, layer in adapted_layers(model).items():
        for attribute in FROZEN:
            if (tensor := adapter.dropped.get(f"{name}.{attribute}")) is not None:
                setattr(layer, attribute, nn.Parameter(tensor.to(layer.a.device), requires_grad=False))
    load_tensors(model, adapter.tensors)


def check_base(adapter: SavedAdapter, base_folder: Path) -> None:
    """Compare the checkpoint's weights with those the adapter was trained on, byte for byte.

    Raises:
        AdapterFileError: naming the first weight that differs.
    """
    weights = CheckpointWeights(base_folder)
    for target in adapter.targets:
        if weight_digest(weights.weight(target)) != adapter.weight_digests[target.name]:
            raise AdapterFileError(
                f"the adapter was trained on {adapter.base}; {target.name} in {base_folder} is another weight"
            )


def _check_module(model: nn.Module, target: Target) -> None:
    try:
        module = model.get_submodule(target.name)
    except AttributeError:
        raise AdapterFileError(
            f"the model has no module {target.name}; the adapter belongs to another architecture"
        ) from None
    shape = (
        getattr(module, "out_features", getattr(module, "nf", None)),
        getattr(module, "in_features", getattr(module, "nx", None)),
    )
    if shape != (target.out_features, target.in_features):
        raise AdapterFileError(
            f"{target.name} is {shape[0]} x {shape[1]}, the adapter's is {target.out_features} x {target.in_features}"
        )
