"""The shape of a base model without its weights and without a network.

A plan (`pipeline.planning.plan`) needs parameter counts and layer sizes before anything is downloaded. They come from the
configuration file of a local folder or of the local hub cache, or from the shapes written below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from kasa.errors import nearest
from pipeline.errors import BaseModelError

_HUB_OWNER = "meta-llama/"

_LLAMA_2: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_3_1: dict[str, Any] = _LLAMA_3 | {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_LLAMA_2_7B = _LLAMA_2 | _sizes(4096, 11008, 32, 32, 32)
_LLAMA_2_13B = _LLAMA_2 | _sizes(5120, 13824, 40, 40, 40)
_LLAMA_2_70B = _LLAMA_2 | _sizes(8192, 28672, 80, 64, 8)
_LLAMA_3_8B = _LLAMA_3 | _sizes(4096, 14336, 32, 32, 8)
_LLAMA_3_70B = _LLAMA_3 | _sizes(8192, 28672, 80, 64, 8)
_LLAMA_3_1_8B = _LLAMA_3_1 | _sizes(4096, 14336, 32, 32, 8)
_LLAMA_3_1_70B = _LLAMA_3_1 | _sizes(8192, 28672, 80, 64, 8)

_KNOWN: dict[str, dict[str, Any]] = {
    "embedded:smollm2-135m-instruct": _SMOLLM2_135M | _sizes(576, 1536, 30, 9, 3),
    "llama-2-7b-hf": _LLAMA_2_7B,
    "llama-2-7b-chat-hf": _LLAMA_2_7B,
    "llama-2-13b-hf": _LLAMA_2_13B,
    "llama-2-13b-chat-hf": _LLAMA_2_13B,
    "llama-2-70b-hf": _LLAMA_2_70B,
    "llama-2-70b-chat-hf": _LLAMA_2_70B,
    "meta-llama-3-8b": _LLAMA_3_8B,
    "meta-llama-3-8b-instruct": _LLAMA_3_8B,
    "meta-llama-3-70b": _LLAMA_3_70B,
    "meta-llama-3-70b-instruct": _LLAMA_3_70B,
    "llama-3.1-8b": _LLAMA_3_1_8B,
    "llama-3.1-8b-instruct": _LLAMA_3_1_8B,
    "llama-3.1-70b": _LLAMA_3_1_70B,
    "llama-3.1-70b-instruct": _LLAMA_3_1_70B,
}


def model_config(model: str, revision: str | None = None, folder: Path | None = None) -> PretrainedConfig | None:
    """The base model's configuration, found without weights and without network; None where it cannot be known.

    Looked for in this order: `folder` (or `model`, where that is a folder), the hub cache of this machine, the built-in
    shapes. Built-in names are hub ids or the part after the owner, in any case; no published revision of them differs
    in shape, so `revision` only picks among cached files.

    Raises:
        BaseModelError: a folder without a readable config.json, a model type that transformers does not know, or an
            `embedded:` name that does not exist.
    """
    local = folder or (Path(model) if Path(model).is_dir() else None)
    cached = local or _cached_folder(model, revision)
    if cached is not None:
        return _read_config(cached)
    name = model.lower().removeprefix(_HUB_OWNER)
    if name in _KNOWN:
        return LlamaConfig(**_KNOWN[name])
    if name.startswith("embedded:"):
        embedded = [known for known in _KNOWN if known.startswith("embedded:")]
        hint = nearest(name, embedded) or f"; there is {', '.join(embedded)}"
        raise BaseModelError(f"base.model {model!r} is not embedded here{hint}")
    return None


def built_in_names() -> list[str]:
    """The models whose shape is known without any file."""
    return list(_KNOWN)


def meta_model(config: PretrainedConfig) -> nn.Module:
    """The model of `config` on torch's meta device: every module and parameter shape, no memory.

    Raises:
        BaseModelError: transformers has no causal language model for this configuration.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise BaseModelError(
            f"base.model of type {config.model_type!r} is no causal language model that transformers can build "
            f"({_one_line(error)}); choose a decoder such as llama, mistral, qwen2 or gpt2"
        ) from None


def _cached_folder(model: str, revision: str | None) -> Path | None:
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _read_config(folder: Path) -> PretrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise BaseModelError(f"base.model folder {folder} holds no config.json; give a folder saved by save_pretrained")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"base.model: {file} cannot be used: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
