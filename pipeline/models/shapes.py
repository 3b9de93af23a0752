"""The shape of a base model, known without its weights and without a network.

A plan needs parameter counts and layer sizes before anything is downloaded. They come from the configuration file of a
local folder or of the local hub cache, or from the built-in table of published models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa.errors import nearest
from kasa.targets import Outline, outline_of
from pipeline.config.settings import HeadKind
from pipeline.core.errors import BaseModelError, one_line
from pipeline.core.files import user_path
from pipeline.models.prompting import head_modules

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

_OWNERS = ("meta-llama/", "mistralai/", "google/", "openai-community/", "facebookai/", "microsoft/")

_LLAMA_2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_3: dict[str, Any] = {
    "model_type": "llama",
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
    "model_type": "llama",
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
_MISTRAL_7B: dict[str, Any] = (
    {"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
    | {"sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2}
    | _sizes(4096, 14336, 32, 32, 8)
)
_GEMMA_7B: dict[str, Any] = (
    {"model_type": "gemma", "vocab_size": 256000, "max_position_embeddings": 8192, "head_dim": 256}
    | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    | _sizes(3072, 24576, 28, 16, 16)
)


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


def _roberta(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = _sizes(hidden, intermediate, layers, heads, heads)
    del sizes["num_key_value_heads"]
    positions = {"max_position_embeddings": 514, "type_vocab_size": 1}
    return {"model_type": "roberta", "vocab_size": 50265} | positions | sizes


_DEBERTA_V3_BASE: dict[str, Any] = {
    "model_type": "deberta-v2",
    "vocab_size": 128100,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "layer_norm_eps": 1e-7,
}

_MINILM_L6: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}

# transformers' configuration values by the model's name: its hub id in lower case, without the owner. The values are those of
# the models' own config.json.
KNOWN_SHAPES: dict[str, dict[str, Any]] = {
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
    "mistral-7b-v0.1": _MISTRAL_7B,
    "gemma-7b": _GEMMA_7B,
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "roberta-base": _roberta(768, 3072, 12, 12),
    "roberta-large": _roberta(1024, 4096, 24, 16),
    "deberta-v3-base": _DEBERTA_V3_BASE,
    "embedded:all-minilm-l6-v2": _MINILM_L6,
}


def model_config(model: str, revision: str | None = None, folder: Path | None = None) -> PretrainedConfig | None:
    """The configuration of a base model, found without its weights and without a network; None if it is not known.

    It is looked for in `folder` (or `model`, if that is a folder), then in the hub cache of this machine, then among the
    built-in shapes. Built-in names are hub ids with or without the owner, in any case. All published revisions of these
    models have the same shape, so `revision` only selects among cached files.

    Raises:
        BaseModelError: A folder has no readable config.json, transformers does not know the model type, or there is no
            such `embedded:` name.
    """
    from transformers import AutoConfig

    local = folder or (user_path(model) if user_path(model).is_dir() else None)
    cached = local or _cached_folder(model, revision)
    if cached is not None:
        return read_config(cached)
    name = _built_in_name(model)
    if name in KNOWN_SHAPES:
        return AutoConfig.for_model(**KNOWN_SHAPES[name])
    if name.startswith("embedded:"):
        embedded = [known for known in KNOWN_SHAPES if known.startswith("embedded:")]
        hint = nearest(name, embedded) or f"; there is {', '.join(embedded)}"
        raise BaseModelError(f"base.model {model!r} is not embedded here{hint}")
    return None


def known_values(model: str, folder: Path | None) -> dict[str, Any] | None:
    """The values of a base model's configuration, read without transformers; None if they are not known so.

    Args:
        folder: where the base lies, if it is here; else its name decides.
    """
    if folder is None:
        return KNOWN_SHAPES.get(_built_in_name(model))
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def built_in_names() -> list[str]:
    """The names of the models whose shape is built in."""
    return list(KNOWN_SHAPES)


def meta_model(config: PretrainedConfig, head: HeadKind = "language-model") -> nn.Module:
    """The model of `config` on torch's meta device: all modules and parameter shapes, without memory for them.

    A new head has the classes that the configuration names, which need not be those of the data.

    Raises:
        BaseModelError: transformers has no model with such a head for this configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    models: Any = AutoModelForCausalLM if head == "language-model" else AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            model: nn.Module = models.from_config(config, trust_remote_code=False)
    except ValueError as error:
        remedy = (
            "is no causal language model that transformers can build ({}); choose a decoder such as llama, mistral, qwen2 or gpt2"
            if head == "language-model"
            else "cannot be given a head for labels by transformers ({}); choose an encoder such as roberta, deberta-v2 or bert"
        )
        raise BaseModelError(f"base.model of type {config.model_type!r} {remedy.format(one_line(error))}") from None
    return model


def base_outline(model: nn.Module, head: HeadKind) -> Outline:
    """The modules of a model that can carry an adapter. A new head is trained in full and carries none."""
    return outline_of(model, head_modules(model) if head != "language-model" else ())


def position_count(model: nn.Module) -> int | None:
    """The length of the longest sequence that a model was made for; None where it has no limit of its own."""
    from torch import nn

    any_model: Any = model
    config = any_model.config.get_text_config()
    known = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    positions = next((int(count) for count in known if count), None)
    if positions is None:
        return None
    positions = _stretched(positions, getattr(config, "rope_parameters", None))
    words = any_model.get_input_embeddings()
    for table in model.modules():
        if isinstance(table, nn.Embedding) and table is not words and table.num_embeddings == positions:
            # Counted from behind the padding token's, where there is one.
            return positions - (0 if table.padding_idx is None else table.padding_idx + 1)
    return positions


def _stretched(positions: int, rope: Any) -> int:
    """The length that rotary positions reach where they are scaled; some configurations state what it was before."""
    if not isinstance(rope, dict) or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return positions
    factor, before = rope.get("factor"), rope.get("original_max_position_embeddings") or positions
    return max(positions, int(before * factor)) if isinstance(factor, int | float) else positions


def _built_in_name(model: str) -> str:
    name = model.lower()
    for owner in _OWNERS:
        name = name.removeprefix(owner)
    return name


def _cached_folder(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in a model's folder. Code that lies beside it is never run.

    Raises:
        BaseModelError: There is none, it cannot be used, or it needs code of its own.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        raise BaseModelError(f"base.model folder {folder} holds no config.json; give a folder saved by save_pretrained")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        if code := _own_code(file):
            raise BaseModelError(
                f"base.model: {file} asks for code of its own ({code}), and code that comes with a model is never run here; "
                "choose a model that transformers has"
            ) from None
        raise BaseModelError(f"base.model: {file} cannot be used: {one_line(error)}") from None


def _own_code(file: Path) -> str | None:
    try:
        classes = json.loads(file.read_text(encoding="utf-8")).get("auto_map", {})
        return next((str(place) for place in classes.values()), None)
    except (OSError, ValueError, AttributeError):
        return None
