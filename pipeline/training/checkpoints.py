"""Training checkpoints of our own: safetensors and JSON, complete or absent, whatever ZeRO stage and number of workers.

DeepSpeed's checkpoints are pickles, and those of stages 1 to 3 load at the same number of workers only.

A checkpoint holds the adapter and AdamW's moments in fp32, and the state of a method that allocates its budget between
steps. Nothing else is state: learning rate, sample order and dropout are functions of the step and the seed.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kasa.errors import AdapterFileError
from kasa.folders import read_tensor_folder, write_tensor_folder

_JSON = "checkpoint.json"
_ALLOCATION = "allocation/"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training.

    Attributes:
        step: optimizer steps done.
        values: the trained tensors by name.
        moments: AdamW's, as `exp_avg/NAME` and `exp_avg_sq/NAME`.
        allocation: the state of `Adapted.allocation`.
    """

    step: int
    values: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    allocation: dict[str, torch.Tensor] = field(default_factory=dict)


def save_checkpoint(root: Path, checkpoint: Checkpoint, kept: int, best: int | None = None) -> None:
    """Write `root/step-N`, then remove older checkpoints and what interrupted writers left.

    Args:
        root: folder of all checkpoints.
        checkpoint: what to write.
        kept: how many of the newest checkpoints stay.
        best: a step whose checkpoint stays too.
    """
    allocation = {f"{_ALLOCATION}{name}": tensor for name, tensor in checkpoint.allocation.items()}
    tensors = {**checkpoint.values, **checkpoint.moments, **allocation}
    write_tensor_folder(_folder(root, checkpoint.step), _JSON, {"step": checkpoint.step}, tensors)
    for old in _complete(root)[:-kept]:
        if _step(old) != best:
            shutil.rmtree(old)
    for orphan in root.glob(".step-*.partial"):
        shutil.rmtree(orphan, ignore_errors=True)


def newest_step(root: Path, at_most: float = math.inf) -> int:
    """The step of the newest checkpoint up to step `at_most`; 0 where there is none."""
    return max((step for step in map(_step, _complete(root)) if step <= at_most), default=0)


def newest_sound_checkpoint(root: Path, at_most: float = math.inf) -> Checkpoint | None:
    """The newest readable checkpoint up to step `at_most`, if any; newer ones that are damaged are removed."""
    while step := newest_step(root, at_most):
        try:
            return load_checkpoint(root, step)
        except AdapterFileError:
            shutil.rmtree(_folder(root, step))
    return None


def load_checkpoint(root: Path, step: int) -> Checkpoint:
    """Read `root/step-N`.

    Raises:
        AdapterFileError: the checkpoint is damaged.
    """
    facts, tensors = read_tensor_folder(_folder(root, step), _JSON)
    allocation = {n.removeprefix(_ALLOCATION): t for n, t in tensors.items() if n.startswith(_ALLOCATION)}
    moments = {n: t for n, t in tensors.items() if "/" in n and not n.startswith(_ALLOCATION)}
    values = {n: t for n, t in tensors.items() if "/" not in n}
    return Checkpoint(facts["step"], values, moments, allocation)


def _folder(root: Path, step: int) -> Path:
    return root / f"step-{step:07d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _complete(root: Path) -> list[Path]:
    return sorted(folder for folder in root.glob("step-*") if (folder / _JSON).exists())
