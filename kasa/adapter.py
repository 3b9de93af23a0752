"""Putting KaSA layers into a model, switching them off, taking them out again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kasa.config import KasaConfig
from kasa.errors import SpectrumError, TargetError, nearest
from kasa.layer import FROZEN, TRAINABLE, KasaLayer
from kasa.spectra import Spectra
from kasa.targets import Target
from kasa.truncation import dropped_rank


def attach(
    model: nn.Module, targets: Sequence[Target], config: KasaConfig, spectra: Spectra | None = None, seed: int = 0
) -> dict[str, KasaLayer]:
    """Wrap each target module in a `KasaLayer` and freeze everything else.

    Args:
        model: the base model; its weights are not changed.
        targets: from `find_targets`.
        config: the adapter's hyperparameters.
        spectra: bottom triplets by layer name; needed unless `config.truncation` is `none`.
        seed: draws A and d, for each layer by its name, whatever the device, order or number of processes.

    Returns:
        The new layers by name.

    Raises:
        SpectrumError: a spectrum is missing, too short, or of another shape.
        TargetError: the model already carries an adapter.
    """
    if adapted_layers(model):
        raise TargetError("the model already carries a KaSA adapter; detach it first")
    model.requires_grad_(False)
    for target in targets:
        dropped = _dropped_factors(target, dropped_rank(target, config.truncation, config.dropped_rank), spectra)
        layer = KasaLayer(model.get_submodule(target.name), target, config, dropped)
        layer.reset(_generator(seed, target.name))
        model.set_submodule(target.name, layer.to(_device_of(layer.base)))
    return adapted_layers(model)


def detach(model: nn.Module) -> nn.Module:
    """Put the base modules back, the same objects as before `attach`."""
    for name, layer in adapted_layers(model).items():
        model.set_submodule(name, layer.base)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base, bit for bit."""
    layers = adapted_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def adapted_layers(model: nn.Module) -> dict[str, KasaLayer]:
    """The model's KaSA layers by the name of the module they wrap."""
    return {layer.target.name: layer for layer in model.modules() if isinstance(layer, KasaLayer)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A, d and B of every layer, as `LAYER.a`, `LAYER.d`, `LAYER.b`: the names used in every file."""
    return _parameters(model, TRAINABLE)


def frozen_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """U_d S_d and V_d^T of every layer that drops something, as `LAYER.dropped_left` and `LAYER.dropped_right`."""
    return _parameters(model, FROZEN)


def load_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy saved A, d and B into an attached adapter.

    Raises:
        TargetError: the names or shapes are not those of the model's adapter.
    """
    parameters = trainable_parameters(model)
    for name in set(parameters) ^ set(tensors):
        raise TargetError(f"adapter tensor {name} does not fit the model's adapted layers{nearest(name, parameters)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise TargetError(f"{name} is {tuple(tensors[name].shape)}, the model needs {tuple(parameter.shape)}")
            parameter.copy_(tensors[name])


def _parameters(model: nn.Module, attributes: Sequence[str]) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{attribute}": parameter
        for name, layer in adapted_layers(model).items()
        for attribute in attributes
        if (parameter := getattr(layer, attribute)) is not None
    }


def _dropped_factors(target: Target, rank: int, spectra: Spectra | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    if rank == 0:
        return None
    if spectra is None or target.name not in spectra:
        raise SpectrumError(f"no singular triplets for {target.name}, of which {rank} are to be dropped")
    left_OD, right_DI = spectra[target.name].dropped_factors(rank)
    if left_OD.shape != (target.out_features, rank) or right_DI.shape != (rank, target.in_features):
        raise SpectrumError(
            f"{target.name} needs {rank} triplets of a {target.out_features} x {target.in_features} weight; "
            f"the spectrum holds {tuple(left_OD.shape)} and {tuple(right_DI.shape)}"
        )
    return left_OD, right_DI


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
