"""The adapter merged into its base: a plain Hugging Face folder, W0 + s B diag(d) A - U_d S_d V_d^T in place of W0.

The sum is formed in fp64 from the stored weight and rounded once; shards are read and written one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kasa.adapter_file import SavedAdapter
from kasa.checkpoint import CheckpointWeights, weight_digest
from kasa.errors import InterchangeError
from kasa.interchange import check_exportable, new_folder, update_factors, write_json, write_texts
from kasa.targets import Target

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Weights in other forms would still be those of the base.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt", ".ot"}
_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        weights: how many weights the adapter changed.
        parameters: of the whole model.
        size: bytes of all tensors.
        dtypes: storage types of the changed weights.
    """

    weights: int
    parameters: int
    size: int
    dtypes: tuple[str, ...]


def merge(
    adapter: SavedAdapter,
    base_folder: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    beside: Mapping[str, str] | None = None,
) -> Merged:
    """Write the base with the adapter merged into it, complete or not at all.

    Args:
        adapter: the adapter.
        base_folder: the Hugging Face folder it was trained on; every weight it touches is compared by digest.
        out: a folder that does not exist yet.
        dtype: the storage type of all floating tensors; None keeps each as the base has it.
        beside: texts to write as files into `out`, by name, in the place of the base's of that name.

    Raises:
        InterchangeError: `out` exists, the base is quantised or another one, or a merged value overflows its type.
        SpectrumError: the base has no such weights, or a shard is damaged.
    """
    check_exportable(adapter)
    config = _read_object(base_folder / "config.json")
    if "quantization_config" in config:
        raise InterchangeError(
            f"{base_folder} is quantised, and a sum cannot be stored in it; merge into the unquantised base, "
            "or use --format lora"
        )
    shards = _shards(base_folder)
    stored = CheckpointWeights(base_folder)
    targets = {stored.tensor_name(target): target for target in adapter.targets}
    with new_folder(out) as folder:
        merger = _Merger(adapter, base_folder, targets, dtype)
        for shard in shards:
            merger.write_shard(shard, folder / shard.name)
        merged = merger.summary()
        _copy_other_files(base_folder, folder)
        if dtype is not None:
            write_json(folder / "config.json", _with_dtype(config, _name(dtype)))
        if (folder / INDEX).exists():
            index = _read_object(base_folder / INDEX)
            metadata = {**index.get("metadata", {}), "total_size": merged.size}
            write_json(folder / INDEX, {**index, "metadata": metadata})
        write_texts(folder, beside or {})
    return merged


class _Merger:
    """Merges shard by shard and counts what it does."""

    def __init__(
        self, adapter: SavedAdapter, base_folder: Path, targets: dict[str, Target], dtype: torch.dtype | None
    ) -> None:
        self._adapter = adapter
        self._base_folder = base_folder
        self._waiting = dict(targets)
        self._dtype = dtype
        self._dtypes: set[str] = set()
        self._parameters = self._size = 0

    def write_shard(self, shard: Path, new: Path) -> None:
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                tensors[name] = self._tensor(name, file.get_tensor(name))
            metadata = file.metadata()
        self._parameters += sum(tensor.numel() for tensor in tensors.values())
        self._size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, new, metadata=metadata or {"format": "pt"})

    def summary(self) -> Merged:
        changed = len(self._adapter.targets)
        return Merged(changed, self._parameters, self._size, tuple(sorted(self._dtypes)))

    def _tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        wanted = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        target = self._waiting.pop(name, None)
        if target is None:
            return tensor.to(wanted)
        merged = self._merged(name, target, tensor).to(wanted)
        if not torch.isfinite(merged).all():
            raise InterchangeError(f"{name} overflows in {_name(wanted)}; merge with --dtype fp32")
        self._dtypes.add(_name(wanted))
        return merged.contiguous()

    def _merged(self, name: str, target: Target, tensor: torch.Tensor) -> torch.Tensor:
        weight_OI = tensor.T if target.transposed else tensor
        if weight_digest(weight_OI) != self._adapter.weight_digests[target.name]:
            raise InterchangeError(
                f"the adapter was trained on {self._adapter.base}; {name} in {self._base_folder} is another weight; "
                "name the folder of its own base with --base"
            )
        left_OK, right_KI = update_factors(self._adapter, target)
        merged_OI = torch.addmm(weight_OI.double(), left_OK, right_KI)
        return merged_OI.T if target.transposed else merged_OI


def _shards(folder: Path) -> list[Path]:
    """The weight files that transformers would load: the single one, else those of the index."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if (folder / INDEX).exists():
        weight_map = _read_object(folder / INDEX).get("weight_map", {})
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.exists():
                raise InterchangeError(f"{folder} is not complete: {shard.name}, named in {INDEX}, is missing")
        return shards
    raise InterchangeError(f"{folder} holds neither {_SINGLE} nor {INDEX}; it is no complete Hugging Face folder")


def _copy_other_files(base_folder: Path, folder: Path) -> None:
    """Configuration, tokenizer, templates, licence: all that is no weight."""
    single = (base_folder / _SINGLE).exists()
    for file in sorted(base_folder.iterdir()):
        foreign_index = file.name.endswith(".index.json") and (single or file.name != INDEX)
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and not foreign_index:
            shutil.copyfile(file, folder / file.name)
        elif file.is_dir() and file.name in _FOLDERS:
            shutil.copytree(file, folder / file.name)


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration with its storage type changed, also where a part of the model (a text model, say) has its own."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    parts = {key: _with_part_dtype(value, name) for key, value in config.items() if isinstance(value, dict)}
    return {**config, **parts, **dict.fromkeys(keys or ["dtype"], name)}


def _with_part_dtype(part: dict[str, Any], name: str) -> dict[str, Any]:
    return {**part, **{key: name for key in ("dtype", "torch_dtype") if part.get(key) is not None}}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InterchangeError(f"{file.parent} has no {file.name}; it is no Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise InterchangeError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InterchangeError(f"{file} is damaged: it holds no JSON object")
    return value
