"""The prepared dataset, as the stages after preparation read it.

train, heldout     Hugging Face datasets on disk (columns: see `COLUMNS` and `LABELLED_COLUMNS`)
validation         another one, if `data.validation_rows` asks for it
calibration        another one, if `data.calibration` names a source
prompting.json     how prompts are written (`pipeline.models.prompting`)
head.json          what the outputs of a new head mean (`pipeline.models.heads`), if the recipe asks for one
rejected.jsonl     every unusable row with its reason
summary.json       counts; written last
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import WorkspaceError
from pipeline.models.heads import Head
from pipeline.models.prompting import Prompting

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("input_ids", "labels", "prompt", "prompt_tokens", "references", "choices", "choice_labels", "source")
# `token_type_ids` is empty if the tokenizer gives none.
LABELLED_COLUMNS = ("input_ids", "token_type_ids", "label", "prompt", "references", "source")


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset. Its splits are mapped from disk when they are first used.

    Attributes:
        folder: The folder that `prepare_dataset` wrote.
        summary: The content of `summary.json`.
    """

    folder: Path
    summary: dict[str, Any]

    @cached_property
    def train(self) -> Dataset:
        """The training split."""
        return self._load("train")

    @cached_property
    def heldout(self) -> Dataset:
        """The held-out split."""
        return self._load("heldout")

    @cached_property
    def validation(self) -> Dataset | None:
        """The split on which the loss is measured during training; None if there is none."""
        return self._load("validation") if (self.folder / "validation").exists() else None

    @cached_property
    def calibration(self) -> Dataset:
        """The text that truncation looks at: that of `data.calibration`, or else the training split."""
        return self._load("calibration") if (self.folder / "calibration").exists() else self.train

    @cached_property
    def prompting(self) -> Prompting:
        """How the prompts were written."""
        return Prompting.load(self.folder)

    @cached_property
    def head(self) -> Head:
        """The head that the samples were prepared for."""
        return Head.load(self.folder)

    def _load(self, name: str) -> Dataset:
        from datasets import load_from_disk  # takes a second to import

        try:
            return load_from_disk(str(self.folder / name))
        except (OSError, ValueError) as error:
            raise WorkspaceError(
                f"{self.folder / name} is damaged ({error}); delete {self.folder} and run again"
            ) from None


def load_prepared(folder: Path) -> PreparedDataset:
    """Open a prepared dataset.

    Raises:
        WorkspaceError: The folder is incomplete or damaged.
    """
    path = folder / "summary.json"
    try:
        return PreparedDataset(folder, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"{path} cannot be read ({error}); delete {folder} and run again") from None
