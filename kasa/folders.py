"""Tensor folders: `tensors.safetensors` + one JSON file. Spectra, adapters and training checkpoints are stored so.

A folder appears complete or not at all: it is written beside its place and moved there by one rename, and its JSON
carries the digest of the tensor file and one of itself, so that a truncated file or a changed byte is noticed when it is read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from kasa.errors import AdapterFileError, DamagedFileError
from kasa.files import check_digests, file_digest, read_sealed_json, replacing, sealed_json

TENSOR_FILE = "tensors.safetensors"


def write_tensor_folder(folder: Path, json_name: str, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write `folder` with `tensors` and, as `json_name`, `facts`; a folder already there is replaced."""
    with replacing(folder) as new:
        new.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new / TENSOR_FILE)
        sealed = sealed_json({**facts, "tensors_sha256": file_digest(new / TENSOR_FILE)})
        (new / json_name).write_text(sealed, encoding="utf-8")


def read_tensor_folder(folder: Path, json_name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The facts and tensors of a folder.

    Raises:
        AdapterFileError: a file is missing or is not what was written.
    """
    try:
        facts = read_sealed_json(folder / json_name)
        data = (folder / TENSOR_FILE).read_bytes()
    except FileNotFoundError as error:
        raise AdapterFileError(f"{folder} is not complete: {Path(error.filename).name} is missing") from None
    except DamagedFileError as error:
        raise AdapterFileError(str(error)) from None
    except OSError as error:
        raise AdapterFileError(f"{folder} cannot be read: {error}") from None
    if hashlib.sha256(data).hexdigest() != facts.pop("tensors_sha256", None):
        raise AdapterFileError(
            f"{folder / TENSOR_FILE} is truncated or was changed: its digest is not the one in {json_name}"
        )
    try:
        return facts, load_tensors(data)
    except SafetensorError as error:
        raise AdapterFileError(f"{folder / TENSOR_FILE} is damaged: {error}") from None


def is_sound(folder: Path, json_name: str) -> bool:
    """Whether the folder is complete and as it was written."""
    try:
        check_digests(folder, {TENSOR_FILE: read_sealed_json(folder / json_name)["tensors_sha256"]})
    except (FileNotFoundError, DamagedFileError):
        return False
    return True
