"""Reading single weights from a Hugging Face folder's safetensors shards, without loading the model."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from kasa.errors import SpectrumError, nearest
from kasa.targets import Target

if TYPE_CHECKING:
    import torch


class CheckpointWeights:
    """The tensors of a checkpoint folder by name; each is read when asked for and not kept.

    Raises:
        SpectrumError: the folder has no safetensors files, or one of them is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _files(self) -> dict[str, Path]:
        return {name: shard for shard in weight_files(self.folder) for name in _shapes(shard)}

    def tensor_name(self, target: Target) -> str:
        """The stored name of a target's weight; a model prefix such as `transformer.` may be missing or extra.

        Raises:
            SpectrumError: no stored tensor, or more than one, fits the name.
        """
        wanted = f"{target.name}.weight"
        if wanted in self._files:
            return wanted
        fitting = [name for name in self._files if name.endswith("." + wanted) or wanted.endswith("." + name)]
        if len(fitting) != 1:
            raise SpectrumError(f"{self.folder} stores no weight {wanted}{nearest(wanted, self._files)}")
        return fitting[0]

    def weight(self, target: Target) -> torch.Tensor:
        """The target's weight as out x in, in its storage type.

        Raises:
            SpectrumError: it is missing, or its shape is not the target's.
        """
        name = self.tensor_name(target)
        with safe_open(self._files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        weight_OI = tensor.T if target.transposed else tensor
        if weight_OI.shape != (target.out_features, target.in_features):
            raise SpectrumError(
                f"{self.folder}: {name} is {tuple(tensor.shape)}, but the model's configuration makes it "
                f"{target.out_features} x {target.in_features}"
            )
        return weight_OI


def weight_digest(weight: torch.Tensor) -> str:
    """SHA-256 over storage type, shape and bytes of a weight: what ties spectra and adapters to their base."""
    import torch

    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    digest.update(weight.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: the single one, else those of the index, else all safetensors files.

    Raises:
        SpectrumError: there are none, one is missing, or the index is damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        if shards := sorted(folder.glob("*.safetensors")):
            return shards
        raise SpectrumError(f"{folder} holds no .safetensors files; convert the checkpoint to safetensors first")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpectrumError(f"{index} is damaged: {error}; copy the whole model folder") from None
    for name in sorted(names):
        if not (folder / name).is_file():
            raise SpectrumError(f"{folder} is not complete: {name}, named in {index.name}, is missing")
    return [folder / name for name in sorted(names)]


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors by name, from the headers of its files.

    Raises:
        SpectrumError: there are none, or a file is missing or damaged.
    """
    return {name: shape for shard in weight_files(folder) for name, shape in _shapes(shard).items()}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the meta device: their shapes without their bytes. Errors as `stored_shapes`."""
    import torch

    return {name: torch.empty(shape, device="meta") for name, shape in stored_shapes(folder).items()}


def _shapes(shard: Path) -> dict[str, tuple[int, ...]]:
    try:
        # Not "pt", which would import torch.
        with safe_open(shard, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise SpectrumError(f"{shard} is damaged: {error}") from None
