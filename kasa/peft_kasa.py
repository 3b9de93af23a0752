"""PEFT's own KaSA folders (`LoraConfig(kasa_config=...)`, Hugging Face PEFT 0.21.2), both ways.

PEFT stores A, d and B alone. When it loads them it cuts the r smallest singular triplets from each base weight by an SVD
of its own; so a folder means something only together with its base, and only adapters made by that rule fit into one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kasa.adapter_file import SavedAdapter
from kasa.checkpoint import CheckpointWeights, weight_digest
from kasa.config import KasaConfig
from kasa.errors import InterchangeError, SpectrumError
from kasa.interchange import PEFT_CONFIG, PEFT_PREFIX, PEFT_TENSORS, check_exportable, write_peft_folder
from kasa.spectra import bottom_triplets
from kasa.targets import Target
from kasa.truncation import dropped_rank

# PEFT's name of each trained tensor.
_PEFT_NAMES = {"a": "lora_A.weight", "d": "lora_diag", "b": "lora_B.weight"}
# Settings that say nothing about what a stored adapter computes, or that are read here.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "kasa_config", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Starts that leave the base weight alone; others (pissa, olora, ...) move a part of it into A and B.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


def export_peft_kasa(
    adapter: SavedAdapter, out: Path, base: str | None = None, beside: Mapping[str, str] | None = None
) -> None:
    """Write the adapter as a folder PEFT loads as KaSA.

    beta and gamma are written as they are; PEFT applies them by the convention `paper` (`kasa.regulariser`).

    Args:
        adapter: the adapter.
        out: a folder that does not exist yet.
        base: what `base_model_name_or_path` says; the adapter's own record by default.
        beside: texts to write as files into `out`, by name.

    Raises:
        InterchangeError: `out` exists, or PEFT would compute something else than this adapter does.
    """
    check_exportable(adapter)
    for target in adapter.targets:
        _check_representable(adapter.config, target)
    config = {
        "base_model_name_or_path": base or adapter.base,
        "fan_in_fan_out": False,
        "kasa_config": {
            "beta": adapter.config.singular_value_weight,
            "gamma": adapter.config.orthogonality_weight,
        },
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "r": adapter.config.rank,
        "target_modules": [target.name for target in adapter.targets],
    }
    tensors = {
        f"{target.name}.{peft_name}": adapter.tensors[f"{target.name}.{attribute}"]
        for target in adapter.targets
        for attribute, peft_name in _PEFT_NAMES.items()
    }
    write_peft_folder(out, config, tensors, beside or {})


def import_peft_kasa(peft_folder: Path, base_folder: Path) -> SavedAdapter:
    """Read a KaSA folder of PEFT's; what it drops is computed from the base, and from then on stored with the adapter.

    Args:
        peft_folder: `adapter_config.json` and `adapter_model.safetensors`.
        base_folder: the base it was trained on. PEFT keeps no digest, so only shapes can be compared.

    Raises:
        InterchangeError: the folder is no plain KaSA adapter, is incomplete, or does not fit the base.
    """
    settings = _read_settings(peft_folder)
    tensors, targets = _read_tensors(peft_folder, settings["r"])
    config = _config(settings, peft_folder)
    weights = CheckpointWeights(base_folder)
    digests: dict[str, str] = {}
    dropped: dict[str, torch.Tensor] = {}
    for target in targets:
        try:
            weight_OI = weights.weight(target)
            triplets = bottom_triplets(weight_OI, config.rank, target.name)
        except SpectrumError as error:
            raise InterchangeError(f"{peft_folder} does not fit the base: {error}") from None
        digests[target.name] = weight_digest(weight_OI)
        left_OD, right_DI = triplets.dropped_factors(config.rank)
        dropped |= {f"{target.name}.dropped_left": left_OD, f"{target.name}.dropped_right": right_DI}
    return SavedAdapter(config, tuple(targets), str(base_folder.absolute()), digests, tensors, dropped)


def _check_representable(config: KasaConfig, target: Target) -> None:
    instead = "PEFT would compute another model from this folder; use --format lora, which is exact"
    if target.transposed:
        raise InterchangeError(f"{target.name} is a Conv1D, on which PEFT refuses KaSA; use --format lora")
    if config.truncation not in ("weight", "authors"):
        raise InterchangeError(
            f"PEFT always drops the {config.rank} smallest singular triplets of a weight, and this adapter was trained "
            f"with truncation {config.truncation!r}; {instead}"
        )
    if (dropped := dropped_rank(target, config.truncation, config.dropped_rank)) != config.rank:
        raise InterchangeError(
            f"PEFT always drops as many triplets as the update has rank ({config.rank}), and this adapter drops "
            f"{dropped} of {target.name}; {instead}"
        )


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InterchangeError(f"{folder} has no {PEFT_CONFIG}; it is no PEFT adapter") from None
    except (OSError, ValueError) as error:
        raise InterchangeError(f"{folder / PEFT_CONFIG} cannot be read: {error}") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA" or not settings.get("kasa_config"):
        raise InterchangeError(
            f"{folder} is no KaSA adapter of PEFT's: {PEFT_CONFIG} needs peft_type LORA and a kasa_config"
        )
    for name, value in settings.items():
        # PEFT writes its defaults: False, None, empty, and "none" for bias.
        if name not in _HARMLESS and value and value != "none":
            raise InterchangeError(f"{folder / PEFT_CONFIG} sets {name} to {value!r}; only plain KaSA can be imported")
    if settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise InterchangeError(
            f"{folder / PEFT_CONFIG} sets init_lora_weights to {settings['init_lora_weights']!r}, which changes the base "
            "weights; only plain KaSA can be imported"
        )
    if not isinstance(settings.get("r"), int) or settings["r"] < 1:
        raise InterchangeError(f"{folder / PEFT_CONFIG} is damaged: r is {settings.get('r')!r}")
    return settings


def _config(settings: dict[str, Any], folder: Path) -> KasaConfig:
    rank, weights = settings["r"], settings["kasa_config"]
    try:
        alpha = float(settings["lora_alpha"])
        return KasaConfig(
            rank=rank,
            # Rank-stabilised: s = alpha / sqrt(r).
            alpha=alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha,
            dropout=float(settings.get("lora_dropout", 0.0)),
            truncation="weight",
            dropped_rank=rank,
            regulariser="paper",
            singular_value_weight=float(weights["beta"]),
            orthogonality_weight=float(weights["gamma"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InterchangeError(f"{folder / PEFT_CONFIG} is damaged: {type(error).__name__} {error}") from None


def _read_tensors(folder: Path, rank: int) -> tuple[dict[str, torch.Tensor], list[Target]]:
    """Our tensors, by our names, and the targets they make."""
    file = folder / PEFT_TENSORS
    if not file.exists():
        remedy = "; save it with safe_serialization=True" if (folder / "adapter_model.bin").exists() else ""
        raise InterchangeError(f"{folder} is not complete: {PEFT_TENSORS} is missing{remedy}")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InterchangeError(f"{file} is damaged: {error}") from None
    tensors = {_our_name(name, file): tensor.float() for name, tensor in stored.items()}
    targets = [_target(name, tensors, rank, file) for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors)]
    if not targets:
        raise InterchangeError(f"{file} holds no tensors")
    return tensors, targets


def _our_name(peft_name: str, file: Path) -> str:
    for attribute, ending in _PEFT_NAMES.items():
        if peft_name.startswith(PEFT_PREFIX) and peft_name.endswith(f".{ending}"):
            return f"{peft_name.removeprefix(PEFT_PREFIX).removesuffix(ending)}{attribute}"
    raise InterchangeError(f"{file} holds {peft_name}, which is no part of KaSA; only plain KaSA can be imported")


def _target(name: str, tensors: dict[str, torch.Tensor], rank: int, file: Path) -> Target:
    try:
        a_RI, d_R, b_OR = (tensors[f"{name}.{attribute}"] for attribute in _PEFT_NAMES)
    except KeyError as error:
        raise InterchangeError(f"{file} is not complete: {error.args[0]} is missing") from None
    out_features, in_features = b_OR.shape[0], a_RI.shape[-1]
    if (a_RI.shape, d_R.shape, b_OR.shape) != ((rank, in_features), (rank,), (out_features, rank)):
        raise InterchangeError(
            f"{file}: A, diag and B of {name} are {tuple(a_RI.shape)}, {tuple(d_R.shape)} and {tuple(b_OR.shape)}, "
            f"which is no adapter of rank {rank}"
        )
    return Target(name, out_features, in_features)
