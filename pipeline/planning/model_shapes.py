"""The shape of a base model without its weights and without a network.

A plan (`pipeline.planning.plan`) needs parameter counts and layer sizes before anything is downloaded. They come from the
configuration file of a local folder or of the local hub cache, or from `pipeline.planning.known_shapes`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from kasa.errors import nearest
from kasa.targets import Outline, outline_of
from pipeline.base.head import HeadKind
from pipeline.errors import BaseModelError
from pipeline.planning.known_shapes import KNOWN_SHAPES

_OWNERS = ("meta-llama/", "mistralai/", "google/", "openai-community/", "facebookai/", "microsoft/")


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
    name = model.lower()
    for owner in _OWNERS:
        name = name.removeprefix(owner)
    if name in KNOWN_SHAPES:
        return AutoConfig.for_model(**KNOWN_SHAPES[name])
    if name.startswith("embedded:"):
        embedded = [known for known in KNOWN_SHAPES if known.startswith("embedded:")]
        hint = nearest(name, embedded) or f"; there is {', '.join(embedded)}"
        raise BaseModelError(f"base.model {model!r} is not embedded here{hint}")
    return None


def built_in_names() -> list[str]:
    """The models whose shape is known without any file."""
    return list(KNOWN_SHAPES)


def meta_model(config: PretrainedConfig, head: HeadKind = "language-model") -> nn.Module:
    """The model of `config` on torch's meta device: every module and parameter shape, no memory.

    A new head is made for the classes that the configuration names, which need not be those of the data.

    Raises:
        BaseModelError: transformers has no model with such a head for this configuration.
    """
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
        raise BaseModelError(f"base.model of type {config.model_type!r} {remedy.format(_one_line(error))}") from None
    return model


def head_modules(model: nn.Module) -> list[str]:
    """The names of the modules beside the body: the new head of a model for labels."""
    body = str(model.base_model_prefix)
    return [name for name, module in model.named_children() if name != body and any(True for _ in module.parameters())]


def base_outline(model: nn.Module, head: HeadKind) -> Outline:
    """Which modules of a model with this head can carry an adapter; a new head is trained whole and carries none."""
    return outline_of(model, head_modules(model) if head != "language-model" else ())


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
