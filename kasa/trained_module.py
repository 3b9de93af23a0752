"""Modules that are trained whole beside an adapter: the classification head of an encoder, say."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from kasa.errors import TargetError, nearest
from kasa.targets import is_suffix


class TrainedModule(nn.Module):
    """A frozen module with a trained copy of it for each adapter that trains one.

    Attributes:
        base: the original, which is in force while no copy is.
        name: the original's name in the model.
        updates: adapter name -> its copy.
        active: the adapter whose copy is in force, or None.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.updates = nn.ModuleDict()
        self.active: str | None = None
        self.training = base.training

    @property
    def module(self) -> nn.Module:
        """The one in force."""
        return self.base if self.active is None else self.updates[self.active]

    # Tied output heads are read by their weight.
    @property
    def weight(self) -> Any:
        """The weight in force."""
        return self.module.weight

    @property
    def bias(self) -> Any:
        """The bias in force."""
        return self.module.bias

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the module in force makes of the arguments."""
        return self.module(*arguments, **options)

    def switch(self, name: str | None) -> None:
        """Make adapter `name`'s copy the one in force; where it has none, or for None, the original."""
        self.active = name if name is not None and name in self.updates else None


def find_trained_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the modules named, each by its last name or by a dotted suffix.

    Raises:
        TargetError: a name matches nothing, or a module without parameters of its own to train.
    """
    modules = {name: module for name, module in model.named_modules() if name and not _is_inside_wrapper(name, model)}
    found: list[str] = []
    for suffix in wanted:
        matching = [name for name in modules if is_suffix(suffix, name)]
        if not matching:
            short_names = sorted({name.rsplit(".", 1)[-1] for name in modules})
            raise TargetError(
                f"trained_modules: {suffix!r} matches no module; the last one of the model is {next(reversed(modules))}"
                f"{nearest(suffix, short_names)}"
            )
        found += [name for name in matching if name not in found]
    for name in found:
        _check_trainable(name, modules[name])
    return found


def trained_copy(module: nn.Module) -> nn.Module:
    """A copy of a module, or of the original inside a `TrainedModule`, to be trained."""
    return copy.deepcopy(module.base if isinstance(module, TrainedModule) else module)


def _is_inside_wrapper(name: str, model: nn.Module) -> bool:
    parents = (name[:end] for end, letter in enumerate(name) if letter == ".")
    return any(isinstance(model.get_submodule(parent), TrainedModule) for parent in parents)


def _check_trainable(name: str, module: nn.Module) -> None:
    parameters = list(module.parameters())
    if not parameters:
        raise TargetError(f"trained_modules: {name} is a {type(module).__name__} without parameters")
    if not all(parameter.is_floating_point() for parameter in parameters):
        raise TargetError(
            f"trained_modules: {name} is quantised, which cannot be trained; leave it out of the quantisation"
        )
    if not all(parameter.numel() for parameter in parameters):
        raise TargetError(f"trained_modules: {name} is partitioned (ZeRO-3); attach the adapter while it is gathered")
