"""Adapters on disk. A saved adapter carries its dropped factors, so loading one does no SVD."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kasa.adapter import (
    DEFAULT,
    adapted_layers,
    chosen_name,
    frozen_factors,
    install,
    load_tensors,
    trainable_parameters,
)
from kasa.checkpoint import CheckpointWeights, weight_digest
from kasa.config import KasaConfig
from kasa.errors import AdapterFileError, TargetError
from kasa.folders import read_tensor_folder, write_tensor_folder
from kasa.layer import FROZEN, TRAINABLE, KasaUpdate
from kasa.targets import Target, as_target, is_within
from kasa.trained_module import TrainedModule
from kasa.truncation import dropped_rank

ADAPTER_JSON = "adapter.json"


@dataclass(frozen=True)
class SavedAdapter:
    """All of an adapter but the base model.

    Attributes:
        config: the hyperparameters it was trained with.
        targets: the adapted modules.
        base: where the base model came from, for people to read.
        weight_digests: layer name -> digest of the base weight the adapter belongs to.
        tensors: `LAYER.a`, `LAYER.d`, `LAYER.b`, trained, fp32; and the parameters of `trained_modules`.
        dropped: `LAYER.dropped_left`, `LAYER.dropped_right`, fp32; empty when nothing is dropped.
        trained_modules: modules trained whole, by the names that `kasa.attach` took.
    """

    config: KasaConfig
    targets: tuple[Target, ...]
    base: str
    weight_digests: dict[str, str]
    tensors: dict[str, torch.Tensor]
    dropped: dict[str, torch.Tensor]
    trained_modules: tuple[str, ...] = ()


def capture_adapter(model: nn.Module, config: KasaConfig, base_folder: Path, name: str | None = None) -> SavedAdapter:
    """The adapter that a live model carries, ready to be saved; tensors are copied to the CPU in fp32.

    Args:
        model: carries the adapter; whole on this process (ZeRO-3 partitions are not).
        config: what it was attached with.
        base_folder: the checkpoint the model was loaded from, whose weights the adapter belongs to from now on.
        name: which adapter; may be left out where there is one only, or for the active one of several.

    Raises:
        TargetError: it is not clear which adapter is meant, or there is none.
        SpectrumError: the checkpoint lacks an adapted weight.
    """
    name = chosen_name(model, name)
    targets = tuple(layer.target for layer in adapted_layers(model).values() if name in layer.updates)
    if not targets:
        raise TargetError("the model carries no adapter")
    weights = CheckpointWeights(base_folder)
    wholes = (module for module in model.modules() if isinstance(module, TrainedModule))
    return SavedAdapter(
        config=config,
        targets=targets,
        base=str(base_folder),
        weight_digests={target.name: weight_digest(weights.weight(target)) for target in targets},
        tensors=_copied(trainable_parameters(model, name)),
        dropped=_copied(frozen_factors(model, name)),
        trained_modules=tuple(module.name for module in wholes if name in module.updates),
    )


def save_adapter(folder: Path, adapter: SavedAdapter) -> None:
    """Write the adapter as `tensors.safetensors` and `adapter.json`, complete or not at all."""
    facts = {
        "format": 1,
        "method": "KaSA (arXiv 2412.06071)",
        "base": adapter.base,
        "config": dataclasses.asdict(adapter.config),
        "targets": [dataclasses.asdict(target) for target in adapter.targets],
        "weight_digests": adapter.weight_digests,
        "trained_modules": adapter.trained_modules,
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
            trained_modules=tuple(facts.get("trained_modules", ())),
        )
    except (KeyError, TypeError) as error:
        raise AdapterFileError(f"{folder / ADAPTER_JSON} is damaged or of another version: {error}") from None


def attach_saved(model: nn.Module, adapter: SavedAdapter, name: str = DEFAULT) -> None:
    """Attach a saved adapter to its base model and activate it; no SVD is done, and `adapter` stays the caller's own.

    Raises:
        AdapterFileError: the model has no such modules, they are of another shape, or the tensors are not the adapter's.
        TargetError: the model already carries an adapter of that name.
    """
    remaining = {**adapter.tensors, **adapter.dropped}
    updates = {}
    for target in adapter.targets:
        _check_module(model, target)
        a, d, b, *dropped = (_taken(remaining, key, shape) for key, shape in _shapes(target, adapter.config).items())
        updates[target] = KasaUpdate(a, d, b, (dropped[0], dropped[1]) if dropped else None, adapter.config)
    for key in remaining:
        if not is_within(key.rpartition(".")[0], adapter.trained_modules):
            raise AdapterFileError(f"the adapter holds a tensor {key}, which belongs to none of its modules")
    install(model, name, updates, adapter.trained_modules)
    if remaining:
        load_tensors(model, {**adapter.tensors}, name)


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


def _copied(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in parameters.items()}


def _check_module(model: nn.Module, target: Target) -> None:
    try:
        module = model.get_submodule(target.name)
    except AttributeError:
        raise AdapterFileError(
            f"the model has no module {target.name}; the adapter belongs to another architecture"
        ) from None
    found = as_target(target.name, module)
    if found is None:
        raise AdapterFileError(f"{target.name} is a {type(module).__name__}, which cannot carry an adapter")
    if (found.out_features, found.in_features) != (target.out_features, target.in_features):
        raise AdapterFileError(
            f"{target.name} is {found.out_features} x {found.in_features}, "
            f"the adapter's is {target.out_features} x {target.in_features}"
        )


def _shapes(target: Target, config: KasaConfig) -> dict[str, tuple[int, ...]]:
    """What a file holds for one target."""
    trainable = ((config.rank, target.in_features), (config.rank,), (target.out_features, config.rank))
    dropped = dropped_rank(target, config.truncation, config.dropped_rank)
    frozen = ((target.out_features, dropped), (dropped, target.in_features)) if dropped else ()
    attributes = TRAINABLE + FROZEN[: len(frozen)]
    return {
        f"{target.name}.{attribute}": shape for attribute, shape in zip(attributes, trainable + frozen, strict=True)
    }


def _taken(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None or tensor.shape != shape:
        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise AdapterFileError(f"the adapter's tensor {name} is {found}; it should be of shape {shape}")
    return tensor.clone()
