"""A KaSA adapter as an ordinary LoRA on the untouched base: exact, because W - W0 has rank r + dropped rank.

Legend: O = out features, I = in features, K = rank of the LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional

from kasa.adapter_file import SavedAdapter
from kasa.errors import InterchangeError
from kasa.interchange import check_exportable, update_factors, write_peft_folder

# The values of vLLM's --max-lora-rank (vllm/config/lora.py).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def lora_rank(adapter: SavedAdapter) -> int:
    """The rank that holds the adapter exactly: r and the most components any of its layers drops."""
    dropped = [tensor.shape[1] for name, tensor in adapter.dropped.items() if name.endswith(".dropped_left")]
    return adapter.config.rank + max(dropped, default=0)


def vllm_rank(rank: int) -> int:
    """The smallest rank vLLM serves that is at least `rank`.

    Raises:
        InterchangeError: there is none.
    """
    for accepted in VLLM_RANKS:
        if accepted >= rank:
            return accepted
    raise InterchangeError(
        f"as a LoRA the adapter has rank {rank}, and vLLM serves at most {VLLM_RANKS[-1]}; use --format merged"
    )


def export_lora(
    adapter: SavedAdapter,
    out: Path,
    rank: int | None = None,
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
    beside: Mapping[str, str] | None = None,
) -> int:
    """Write the adapter as a LoRA that PEFT and vLLM load onto the original base.

    The scale is part of B (`lora_alpha` is the rank, so that PEFT's own factor is 1). Layers that drop less than others
    are padded with zeros to one rank.

    Args:
        adapter: the adapter.
        out: a folder that does not exist yet.
        rank: the LoRA's rank, at least `lora_rank(adapter)`, which is the default.
        base: what `base_model_name_or_path` says; the adapter's own record by default.
        dtype: the storage type.
        beside: texts to write as files into `out`, by name.

    Returns:
        The rank written.

    Raises:
        InterchangeError: `out` exists, `rank` is too small, or the adapter is more than low-rank updates.
    """
    check_exportable(adapter)
    needed = lora_rank(adapter)
    rank = needed if rank is None else rank
    if rank < needed:
        raise InterchangeError(
            f"a LoRA of rank {rank} cannot hold the adapter; it needs {needed}: rank {adapter.config.rank} for the "
            f"update and {needed - adapter.config.rank} for what is dropped from the base"
        )
    tensors = {}
    for target in adapter.targets:
        left_OK, right_KI = update_factors(adapter, target)
        missing = rank - len(right_KI)
        tensors[f"{target.name}.lora_A.weight"] = functional.pad(right_KI, (0, 0, 0, missing)).to(dtype)
        tensors[f"{target.name}.lora_B.weight"] = functional.pad(left_OK, (0, missing)).to(dtype)
    config = {
        "base_model_name_or_path": base or adapter.base,
        "fan_in_fan_out": any(target.transposed for target in adapter.targets),
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": [target.name for target in adapter.targets],
    }
    write_peft_folder(out, config, tensors, beside or {})
    return rank
