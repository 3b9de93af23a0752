"""The base model: where it is and what it is made of, without its weights, and without torch where that is known already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa.targets import Outline, Target, select_targets
from pipeline.base.folder import find_folder, folder_digest
from pipeline.base.head import HeadKind
from pipeline.base.outline import remembered_outline
from pipeline.settings import BaseSettings

if TYPE_CHECKING:
    from kasa import CheckpointWeights

_COUNTING_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True)
class BaseModel:
    """A base model on local or shared storage.

    Attributes:
        name: as the recipe has it.
        folder: its Hugging Face folder.
        head: what it is given to answer with.
        outlines: the folder where outlines of bases are kept; none is kept without it.
    """

    name: str
    folder: Path
    head: HeadKind = "language-model"
    outlines: Path | None = None

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
        config = self.config
        positions = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 2**20)
        # RoBERTa and its like count positions from behind the padding token.
        return positions - config.pad_token_id - 1 if config.model_type in _COUNTING_FROM_PADDING else positions

    def targets(self, wanted: str | Sequence[str]) -> list[Target]:
        """The modules that carry an adapter, found without loading a weight.

        Raises:
            TargetError: `wanted` matches nothing.
        """
        return select_targets(self._outline, wanted)

    @cached_property
    def _outline(self) -> Outline:
        def draw() -> Outline:
            from pipeline.planning.model_shapes import base_outline, meta_model  # torch and transformers

            return base_outline(meta_model(self.config, self.head), self.head)

        return draw() if self.outlines is None else remembered_outline(self.outlines, self.digest, self.head, draw)

    @property
    def weights(self) -> CheckpointWeights:
        """Its stored weights by name."""
        from kasa import CheckpointWeights

        return CheckpointWeights(self.folder)


def find_base(settings: BaseSettings, workspace: Path, fetch: bool = True) -> BaseModel | None:
    """The base model's folder; an embedded or hub model is fetched into the workspace first.

    Args:
        fetch: whether anything may be fetched or kept.

    Returns:
        None only where `fetch` is false and the model is not there yet.

    Raises:
        BaseModelError: there is no such model, it cannot be fetched, or it is no safetensors checkpoint.
    """
    folder = find_folder(settings, workspace, fetch)
    if folder is None:
        return None
    return BaseModel(settings.model, folder, settings.head, workspace / "outlines" if fetch else None)
