"""Checkpoints that hold their weights as pickles alone (`pytorch_model.bin`): stored once more, as safetensors.

A pickle can run any code when it is opened. It is opened here and nowhere else, by torch's weights-only loader, which builds
tensors and refuses everything else.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.errors import BaseModelError, WorkspaceError, one_line
from pipeline.core.files import content_digest, make_once

PICKLES = "pytorch_model*.bin"
_SINGLE = "pytorch_model.bin"


def pickle_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights as pickles: the single one, else all parts."""
    single = folder / _SINGLE
    return [single] if single.exists() else sorted(folder.glob(PICKLES))


def converted_folder(folder: Path, cache: Path) -> Path:
    """Where the checkpoint lies as safetensors, or would lie."""
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in pickle_files(folder)]
    return cache / f"safetensors-{content_digest({'folder': str(folder.resolve()), 'files': seen})[:16]}"


def convert(folder: Path, out: Path, other_files: Iterable[Path]) -> Path:
    """Write `out`, with the weights of `folder` as safetensors and the other files as they are; complete or not at all.

    Raises:
        BaseModelError: A pickle is damaged, or holds more than weights.
        WorkspaceError: `out` cannot be written.
    """

    def make(new: Path) -> None:
        new.mkdir(parents=True, exist_ok=True)
        places = {}
        for file in pickle_files(folder):
            name = file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            places.update(dict.fromkeys(_convert_file(file, new / name), name))
        if len(set(places.values())) > 1:
            index = {"metadata": {}, "weight_map": places}
            (new / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        for file in other_files:
            shutil.copyfile(file, new / file.name)

    try:
        return make_once(out, make)
    except OSError as problem:
        raise WorkspaceError(
            f"the weights of {folder} cannot be stored in {out}: {problem}; free space or rights?"
        ) from None


def _convert_file(file: Path, out: Path) -> list[str]:
    """The names of the tensors that were stored."""
    import torch
    from safetensors.torch import save_file

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{file} is damaged, or holds more than weights: {one_line(error, 160)}") from None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise BaseModelError(f"{file} holds more than weights by name; convert it to safetensors first")
    # Tied weights share their memory, which safetensors does not store.
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, out, {"format": "pt"})
    out.chmod(0o644)
    return list(found)
