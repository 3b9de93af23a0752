"""Putting KaSA adapters into a model, switching between them, taking them out again.

A model may carry several adapters, of different ranks and on different modules; at most one is active. What an adapter
changes is an update beside each of its targets (`KasaLayer`) and perhaps modules that are trained whole (`TrainedModule`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from kasa.config import KasaConfig
from kasa.errors import KasaError, SpectrumError, TargetError, nearest
from kasa.layer import FROZEN, TRAINABLE, KasaLayer, KasaUpdate
from kasa.spectra import Spectra
from kasa.targets import Target, is_within
from kasa.trained_module import TrainedModule, find_trained_modules, trained_copy
from kasa.truncation import dropped_rank

DEFAULT = "default"

_Module = TypeVar("_Module", bound=nn.Module)


def attach(
    model: nn.Module,
    targets: Sequence[Target],
    config: KasaConfig,
    spectra: Spectra | None = None,
    seed: int = 0,
    name: str = DEFAULT,
    trained_modules: Sequence[str] = (),
) -> dict[str, KasaLayer]:
    """Give the model a new adapter, make it the active one, and freeze everything else.

    Args:
        model: the base model, with or without other adapters; its weights are not changed.
        targets: from `find_targets`.
        config: the adapter's hyperparameters.
        spectra: bottom triplets by layer name; needed unless `config.truncation` is `none`.
        seed: draws A and d, for each layer by its name, whatever the device, order or number of processes.
        name: the adapter's.
        trained_modules: modules to train whole, as full names or dotted ends of them (an encoder's `classifier`).

    Returns:
        All adapted layers by name.

    Raises:
        SpectrumError: a spectrum is missing, too short, or of another shape.
        TargetError: the model already has an adapter of that name, or a module named cannot be trained.
    """
    updates = {}
    for target in targets:
        dropped = _dropped_factors(target, dropped_rank(target, config.truncation, config.dropped_rank), spectra)
        updates[target] = KasaUpdate.fresh(target, config, dropped, _generator(seed, target.name))
    install(model, name, updates, trained_modules)
    return adapted_layers(model)


def install(
    model: nn.Module, name: str, updates: Mapping[Target, KasaUpdate], trained_modules: Sequence[str] = ()
) -> None:
    """Put ready updates in place under an adapter's name and activate it; see `attach`, which makes new ones.

    Raises:
        TargetError: see `attach`.
    """
    _check_name(model, name)
    whole = find_trained_modules(model, trained_modules)
    for target in updates:
        if is_within(target.name, whole):
            raise TargetError(f"{target.name} is to be trained whole; leave it out of the targets")
    places = _places(model)
    model.requires_grad_(False)
    for target, update in updates.items():
        module = model.get_submodule(target.name)
        if not isinstance(module, KasaLayer):
            module = _put(places[module], KasaLayer(module, target))
        module.updates[name] = update.to(_device_of(module.base)).train(module.training)
    for path in whole:
        module = model.get_submodule(path)
        copied = trained_copy(module)
        if not isinstance(module, TrainedModule):
            module = _put(places[module], TrainedModule(module, path))
        module.updates[name] = copied
    activate(model, name)


def activate(model: nn.Module, name: str) -> None:
    """Make an attached adapter the active one; its tensors and no others are trainable from now on.

    Raises:
        TargetError: the model has no such adapter.
    """
    _check_attached(model, name)
    for wrapper in _wrappers(model):
        wrapper.switch(name)
        for owner, update in wrapper.updates.items():
            fixed = FROZEN + getattr(update, "fixed", ())
            for attribute, parameter in update.named_parameters():
                parameter.requires_grad_(owner == name and attribute not in fixed)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take out one adapter, or all of them; a module left without any is the same object as before `attach`.

    If the active adapter goes, none is active. All that remains stays frozen.

    Raises:
        TargetError: the model has no such adapter.
    """
    if name is not None:
        _check_attached(model, name)
    places = _places(model)
    for wrapper in list(_wrappers(model)):
        for gone in [owner for owner in wrapper.updates if name in (None, owner)]:
            if wrapper.active == gone:
                wrapper.switch(None)
            del wrapper.updates[gone]
        if not wrapper.updates:
            _put(places[wrapper], wrapper.base)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base, bit for bit."""
    wrappers = list(_wrappers(model))
    before = [wrapper.active for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.switch(None)
        yield
    finally:
        for wrapper, active in zip(wrappers, before, strict=True):
            wrapper.switch(active)


def fold(model: nn.Module) -> None:
    """Truncate the base weights themselves, for speed: the active adapter's dropped part costs nothing from now on.

    Each whole weight is kept, and put back bit for bit where the adapter is switched, disabled or detached, or by `unfold`;
    a folded model stays so with the adapter that is active next. Until then `state_dict` holds truncated weights, and in a
    16-bit type rounding has undone part of the truncation (docs/decisions.md).

    Raises:
        KasaError: a base weight is quantised, partitioned, or shared with another module; nothing is folded then.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = adapted_layers(model)
    try:
        for name, layer in layers.items():
            if owners[id(layer.base.weight)] > 1:
                raise KasaError(f"{name} shares its weight with another module, so nothing can be folded into it")
            layer.fold()
    except KasaError:
        unfold(model)
        raise


def unfold(model: nn.Module) -> None:
    """Undo `fold`: the base weights are what they were, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unfold()


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that the model carries, in the order of attaching."""
    return list(dict.fromkeys(name for wrapper in _wrappers(model) for name in wrapper.updates))


def adapted_layers(model: nn.Module) -> dict[str, KasaLayer]:
    """The model's KaSA layers by the name of the module they wrap."""
    return {layer.target.name: layer for layer in model.modules() if isinstance(layer, KasaLayer)}


def trainable_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """A, d and B of every layer, as `LAYER.a`, `LAYER.d`, `LAYER.b`, and the parameters of modules trained whole, under
    the names they have in the base: the names used in every file.

    Args:
        model: carries the adapter.
        name: which adapter; may be left out where there is one only, or for the active one of several.

    Raises:
        TargetError: it is not clear which adapter is meant, or there is no such adapter.
    """
    found = _update_parameters(model, TRAINABLE, name := chosen_name(model, name))
    for module in model.modules():
        if isinstance(module, TrainedModule) and name in module.updates:
            found |= {f"{module.name}.{key}": p for key, p in module.updates[name].named_parameters()}
    return found


def frozen_factors(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """U_d S_d and V_d^T of every layer that drops something, as `LAYER.dropped_left` and `LAYER.dropped_right`.

    Arguments and errors as in `trainable_parameters`.
    """
    return _update_parameters(model, FROZEN, chosen_name(model, name))


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str | None = None) -> None:
    """Copy saved trainable tensors into an attached adapter, chosen as in `trainable_parameters`.

    Raises:
        TargetError: the names or shapes are not those of the model's adapter.
    """
    parameters = trainable_parameters(model, name)
    for key in parameters.keys() ^ tensors.keys():
        raise TargetError(f"adapter tensor {key} does not fit the model's adapted layers{nearest(key, parameters)}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            if parameter.shape != tensors[key].shape:
                raise TargetError(f"{key} is {tuple(tensors[key].shape)}, the model needs {tuple(parameter.shape)}")
            parameter.copy_(tensors[key])


def chosen_name(model: nn.Module, name: str | None) -> str:
    """The adapter that is meant: the one named, the active one, the only one, or "" where there is none.

    Raises:
        TargetError: there is no adapter of that name, or none is named or active among several.
    """
    if name is not None:
        _check_attached(model, name)
        return name
    names = adapter_names(model)
    active = list({wrapper.active for wrapper in _wrappers(model) if wrapper.active is not None})
    if len(names) > 1 and not active:
        raise TargetError(f"the model carries {', '.join(names)}, and none is active: name one of them")
    return (active or names or [""])[0]


def _wrappers(model: nn.Module) -> Iterator[KasaLayer | TrainedModule]:
    return (module for module in model.modules() if isinstance(module, KasaLayer | TrainedModule))


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Where each module stands, as (parent, attribute): some models use one module in several places."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        # Not named_children, which tells of each child once.
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return places


def _put(places: Sequence[tuple[nn.Module, str]], module: _Module) -> _Module:
    for parent, attribute in places:
        setattr(parent, attribute, module)
    return module


def _check_name(model: nn.Module, name: str) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise TargetError(f"{name!r} cannot name an adapter: it must be a plain word, without dots, not torch's own")
    if name in adapter_names(model):
        raise TargetError(f"the model already carries an adapter {name!r}; detach it first, or name the new one")


def _check_attached(model: nn.Module, name: str) -> None:
    names = adapter_names(model)
    if name not in names:
        raise TargetError(
            f"the model carries no adapter {name!r}, only {', '.join(names) or 'none at all'}{nearest(name, names)}"
        )


def _update_parameters(model: nn.Module, attributes: Sequence[str], name: str) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{attribute}": parameter
        for path, layer in adapted_layers(model).items()
        if name in layer.updates
        for attribute in attributes
        if (parameter := getattr(layer.updates[name], attribute)) is not None
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
    return left_OD.clone(), right_DI.clone()


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
