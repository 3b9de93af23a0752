"""Tensor folders: `tensors.safetensors` + one JSON file. Spectra, adapters and training checkpoints are stored so.

A folder appears complete or not at all: it is written beside its place and moved there by one rename, and its JSON
carries the digest of the tensor file, so that a truncated file or a changed byte is noticed when it is read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from kasa.errors import AdapterFileError
from kasa.files import file_digest, replacing

TENSOR_FILE = "tensors.safetensors"


def write_tensor_folder(folder: Path, json_name: str, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write `folder` with `tensors` and, as `json_name`, `facts`; a folder already there is replaced."""
    with replacing(folder) as new:
        new.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new / TENSOR_FILE)
        sealed = {**facts, "tensors_sha256": file_digest(new / TENSOR_FILE)}
        (new / json_name).write_text(json.dumps(sealed, indent=1, sort_keys=True), encoding="utf-8")


def read_tensor_folder(folder: Path, json_name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The facts and tensors of a folder.

    Raises:
        AdapterFileError: a file is missing or is not what was written.
    """
    try:
        facts = json.loads((folder / json_name).read_text(encoding="utf-8"))
        data = (folder / TENSOR_FILE).read_bytes()
    except FileNotFoundError as error:
        raise AdapterFileError(f"{folder} is not complete: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{folder} cannot be read: {error}") from None
    if not isinstance(facts, dict):
        raise AdapterFileError(f"{folder / json_name} is damaged: it holds no JSON object")
    if hashlib.sha256(data).hexdigest() != facts.pop("tensors_sha256", None):
        raise AdapterFileError(
            f"{folder / TENSOR_FILE} is truncated or was changed: its digest is not the one in {json_name}"
        )
    try:
        return facts, load_tensors(data)
    except SafetensorError as error:
        raise AdapterFileError(f"{folder / TENSOR_FILE} is damaged: {error}") from None
