"""The base model: where it is, what it is made of, and how it is loaded. The door to transformers' model classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kasa import CheckpointWeights, find_targets
from kasa.folders import file_digest
from kasa.targets import Target
from pipeline.artifacts import content_digest
from pipeline.embedded import PREFIX, embedded_base, embedded_path_if_present
from pipeline.errors import BaseModelError
from pipeline.model_shapes import meta_model
from pipeline.recipe import BaseSettings

# Everything that decides what the model computes and how text becomes tokens.
_CONTENT = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BaseModel:
    """A base model on local or shared storage.

    Attributes:
        name: as the recipe has it.
        folder: its Hugging Face folder.
    """

    name: str
    folder: Path

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content of its files, independent of where it lies."""
        files = sorted({file for pattern in _CONTENT for file in self.folder.glob(pattern)})
        return content_digest({file.name: file_digest(file) for file in files})

    @cached_property
    def config(self) -> Any:
        """Its transformers configuration."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder, local_files_only=True)

    @property
    def context_tokens(self) -> int:
        """The longest sequence it was made for."""
        return int(
            getattr(self.config, "max_position_embeddings", 0) or getattr(self.config, "n_positions", 0) or 2**20
        )

    def targets(self, wanted: str | Sequence[str]) -> list[Target]:
        """The modules that carry an adapter, found without loading a weight.

        Raises:
            TargetError: `wanted` matches nothing.
        """
        return find_targets(meta_model(self.config), wanted)

    @property
    def weights(self) -> CheckpointWeights:
        """Its stored weights by name."""
        return CheckpointWeights(self.folder)


def find_base(settings: BaseSettings, workspace: Path, fetch: bool = True) -> BaseModel | None:
    """The base model's folder; an embedded or hub model is fetched into the workspace first, if `fetch` allows.

    Returns:
        None only where `fetch` is false and the model is not there yet.

    Raises:
        BaseModelError: there is no such model, it cannot be fetched, or it is no safetensors checkpoint.
    """
    folder = _folder(settings, workspace, fetch)
    if folder is None:
        return None
    _check_folder(folder, settings.model)
    return BaseModel(settings.model, folder.resolve())


def load_base(folder: Path, precision: str) -> nn.Module:
    """The model with its weights on the CPU (or partitioned, where ZeRO-3 has been announced), in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[precision], attn_implementation="sdpa", local_files_only=True
    )


def _folder(settings: BaseSettings, workspace: Path, fetch: bool) -> Path | None:
    if settings.model.startswith(PREFIX):
        name = settings.model.removeprefix(PREFIX)
        return embedded_base(name, workspace) if fetch else embedded_path_if_present(name, workspace)
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or settings.model.startswith((".", "~")) or settings.model.count("/") != 1:
        raise BaseModelError(f"base.model {settings.model} is neither a folder nor a hub id (ORGANISATION/NAME)")
    return _from_hub(settings, fetch)


def _from_hub(settings: BaseSettings, fetch: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    patterns = [*_CONTENT, "*.index.json"]
    try:
        return Path(
            snapshot_download(
                settings.model, revision=settings.revision, allow_patterns=patterns, local_files_only=not fetch
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        if not fetch:
            return None
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"base.model {settings.model} cannot be fetched from the hub ({type(error).__name__}: {reason}); "
            "without a network, name a local folder"
        ) from error


def _check_folder(folder: Path, name: str) -> None:
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            f"base.model {name}: {folder} has no config.json; it is no Hugging Face model folder"
        ) from None
    except ValueError as error:
        raise BaseModelError(f"base.model {name}: {folder / 'config.json'} is damaged: {error}") from None
    if not list(folder.glob("*.safetensors")):
        raise BaseModelError(f"base.model {name}: {folder} has no .safetensors weights; convert the checkpoint first")
