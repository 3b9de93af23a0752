"""Reading single weights from a Hugging Face folder's safetensors shards, without loading the model."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kasa.errors import SpectrumError, nearest
from kasa.targets import Target


class CheckpointWeights:
    """The tensors of a checkpoint folder by name; each is read when asked for and not kept.

    Raises:
        SpectrumError: the folder has no safetensors files, or one of them is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _files(self) -> dict[str, Path]:
        shards = sorted(self.folder.glob("*.safetensors"))
        if not shards:
            raise SpectrumError(
                f"{self.folder} holds no .safetensors files; convert the checkpoint to safetensors first"
            )
        return {name: shard for shard in shards for name in _tensor_names(shard)}

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
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    digest.update(weight.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensor_names(shard: Path) -> list[str]:
    try:
        with safe_open(shard, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise SpectrumError(f"{shard} is damaged: {error}") from None
