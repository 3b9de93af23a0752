"""What all exchange formats share: the adapter as plain low-rank factors, and folders that appear whole.

Legend: O = out features, I = in features, R = adapter rank, D = dropped rank, K = R + D.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kasa.adapter_file import SavedAdapter
from kasa.errors import InterchangeError
from kasa.files import replacing
from kasa.layer import FROZEN, TRAINABLE
from kasa.targets import Target

# PEFT's names for an adapter's two files, and what it puts before the name of every module.
PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def update_factors(adapter: SavedAdapter, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """(left_OK, right_KI) in fp64, with W = W0 + left @ right: what the adapter makes of the base weight W0.

    left = [s B diag(d) | -U_d S_d], right = [A ; V_d^T]; D may be zero.
    """
    a_RI, d_R, b_OR = (adapter.tensors[f"{target.name}.{attribute}"].double() for attribute in TRAINABLE)
    left_OR = adapter.config.scale * b_OR * d_R
    dropped = [adapter.dropped.get(f"{target.name}.{attribute}") for attribute in FROZEN]
    if dropped[0] is None or dropped[1] is None:
        return left_OR, a_RI
    return torch.cat([left_OR, -dropped[0].double()], dim=1), torch.cat([a_RI, dropped[1].double()])


def check_exportable(adapter: SavedAdapter) -> None:
    """Refuse an adapter that holds other tensors than A, d and B of its targets, or values that are no numbers.

    Raises:
        InterchangeError: naming the tensor.
    """
    expected = {f"{target.name}.{attribute}" for target in adapter.targets for attribute in TRAINABLE}
    if missing := sorted(expected - set(adapter.tensors)):
        raise InterchangeError(f"the adapter lacks {missing[0]}; it was not written whole")
    if extra := sorted(set(adapter.tensors) - expected):
        raise InterchangeError(
            f"the adapter also trained {extra[0]}, which is no low-rank update; only adapters without trained modules "
            "can be exported"
        )
    for name, tensor in {**adapter.tensors, **adapter.dropped}.items():
        if not torch.isfinite(tensor).all():
            raise InterchangeError(f"the adapter's {name} holds NaN or Inf: its training diverged; train it again")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        InterchangeError: `out` exists, or cannot be made.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise InterchangeError(f"{out} exists already; name another folder, or delete it first")
    try:
        with replacing(out) as folder:
            try:
                folder.mkdir(parents=True)
            except (FileExistsError, NotADirectoryError, PermissionError) as error:
                raise InterchangeError(f"{out} cannot be made: {error.strerror} ({error.filename})") from None
            yield folder
            _make_readable(folder)
    except SafetensorError as error:
        raise InterchangeError(f"{out} was not written: {error}") from None


def _make_readable(folder: Path) -> None:
    """Give every file the rights that the umask grants: safetensors files are written for their owner alone."""
    rights = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(rights)


def write_peft_folder(
    out: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], beside: Mapping[str, str]
) -> None:
    """Write an adapter in PEFT's layout, complete or not at all.

    Args:
        out: a folder that does not exist yet.
        config: what this kind of adapter adds to, or changes in, the common configuration.
        tensors: by PEFT's names without the prefix.
        beside: texts to write as files beside, by name.
    """
    common = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    with new_folder(out) as folder:
        named = {f"{PEFT_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, folder / PEFT_TENSORS, metadata={"format": "pt"})
        write_json(folder / PEFT_CONFIG, {**common, **config})
        write_texts(folder, beside)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON object the way Hugging Face's libraries do."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write text files into a folder, by name; they replace files of these names."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
