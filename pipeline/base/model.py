"""The base model: where it is, what it is made of, and how it is loaded. The door to transformers' model classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kasa import CheckpointWeights, find_targets
from kasa.targets import Target
from pipeline.base.folder import find_folder, folder_digest
from pipeline.planning.model_shapes import meta_model
from pipeline.settings import BaseSettings

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
        return folder_digest(self.folder)

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
    folder = find_folder(settings, workspace, fetch)
    return None if folder is None else BaseModel(settings.model, folder)


def load_base(folder: Path, precision: str) -> nn.Module:
    """The model with its weights on the CPU (or partitioned, where ZeRO-3 has been announced), in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[precision], attn_implementation="sdpa", local_files_only=True
    )
