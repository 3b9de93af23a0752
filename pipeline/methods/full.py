"""Full fine-tuning: every parameter of the base is trained and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kasa.errors import AdapterFileError
from kasa.folders import read_tensor_folder, write_tensor_folder
from kasa.targets import Target
from pipeline.methods.method import Adapted, Tensors
from pipeline.models.loading import DTYPES
from pipeline.models.prompting import LANGUAGE_MODEL, Head

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe
    from pipeline.models.base import BaseModel

WEIGHTS_JSON = "weights.json"


@dataclass(frozen=True)
class FullMethod:
    """All weights, embeddings and output head included; weights that the base ties stay tied.

    Attributes:
        base_name: the base, for the record of the weights.
        dtype: the type that the weights are stored in, which is that of the training.
    """

    base_name: str
    dtype: torch.dtype

    def attach(
        self, model: nn.Module, seed: int, steps: int, modules_to_save: Sequence[str] = (), head: Head = LANGUAGE_MODEL
    ) -> Adapted:
        """See `Method.attach`."""
        model.requires_grad_(True)

        def save(folder: Path, values: Tensors) -> None:
            facts = {"format": 1, "method": "full", "base": self.base_name}
            stored = {name: value.to(self.dtype) for name, value in values.items()}
            write_tensor_folder(folder, WEIGHTS_JSON, facts, stored)

        return Adapted(dict(model.named_parameters()), save)


def build(
    recipe: Recipe, base: BaseModel, targets: tuple[Target, ...], spectra: Path | None, start: Path | None
) -> FullMethod:
    """See `pipeline.methods.method`."""
    return FullMethod(base.name, DTYPES[recipe.train.precision])


def parameter_count(name: str, targets: Sequence[Target], model: nn.Module) -> int:
    """All parameters of the base."""
    return sum(parameter.numel() for parameter in model.parameters())


def load_weights(model: nn.Module, folder: Path) -> None:
    """Replace the weights of a loaded base by trained ones.

    Raises:
        AdapterFileError: the folder is damaged, or belongs to another architecture.
    """
    _, tensors = read_tensor_folder(folder, WEIGHTS_JSON)
    own = dict(model.named_parameters())
    for name in own.keys() ^ tensors.keys():
        raise AdapterFileError(f"{folder} belongs to another architecture than the base: only one of them has {name}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise AdapterFileError(
                    f"{folder}: {name} is {tuple(tensors[name].shape)}, the base's is {tuple(parameter.shape)}"
                )
            parameter.copy_(tensors[name])


def base_of_weights(folder: Path) -> str:
    """Where the base of the trained weights came from: a folder or a hub id."""
    return str(read_tensor_folder(folder, WEIGHTS_JSON)[0]["base"])
