"""Full fine-tuning: every parameter of the base is trained and saved.

Putting a trained adapter onto its base, whatever method trained it: the files in its folder say which loader it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kasa import attach_saved, read_adapter
from kasa.adapter_file import ADAPTER_JSON, check_base
from kasa.errors import AdapterFileError
from kasa.folders import read_tensor_folder, write_tensor_folder
from kasa.interchange import PEFT_CONFIG
from kasa.targets import Target
from pipeline.methods.method import Adapted, Tensors
from pipeline.models.forward import DTYPES
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


# The file by which a folder of each format is recognised.
MARKS = (ADAPTER_JSON, PEFT_CONFIG, WEIGHTS_JSON)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter of some method."""
    return any((folder / mark).is_file() for mark in MARKS)


def attach_folder(model: nn.Module, folder: Path) -> None:
    """Put the adapter in `folder` into a loaded base, in place.

    Raises:
        AdapterFileError: the folder is no adapter, damaged, or made for another architecture.
    """
    if (folder / PEFT_CONFIG).exists() and not (folder / ADAPTER_JSON).exists():
        from pipeline.methods.peft import load_peft_folder  # slow, and needed for other methods than KaSA alone

        load_peft_folder(model, folder)
    elif (folder / WEIGHTS_JSON).exists():
        load_weights(model, folder)
    else:
        attach_saved(model, read_adapter(folder))


def base_name(folder: Path) -> str:
    """Where the base of the adapter in `folder` came from: a folder or a hub id.

    Raises:
        AdapterFileError: the folder is no adapter, or damaged.
    """
    if (folder / ADAPTER_JSON).exists():
        return read_adapter(folder).base
    if (folder / WEIGHTS_JSON).exists():
        return base_of_weights(folder)
    from pipeline.methods.peft import base_of_peft_folder

    return base_of_peft_folder(folder)


def check_saved_base(folder: Path, base: Path) -> None:
    """Check that the base is the one that the adapter was trained on. Only KaSA adapters record enough for that.

    Raises:
        AdapterFileError: it is another one, or the folder holds no adapter.
    """
    if (folder / ADAPTER_JSON).exists():
        check_base(read_adapter(folder), base)
    elif not is_adapter(folder):
        raise AdapterFileError(f"{folder} holds no adapter: none of {', '.join(MARKS)}")
