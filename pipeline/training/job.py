"""What the training stage and its workers tell each other: the job, and the files in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.training import TrainSettings
from pipeline.core.journal import Record, read_journal

if TYPE_CHECKING:
    from pipeline.methods.method import Method

JOURNAL = "journal.jsonl"
ROLL_CALL = "roll-call"
# What rank 0 found out when it put the method into the base: `trainable_parameters`, and `attach_s` in seconds.
ATTACHED = "attached.json"
# Written by the driver; each file has one writer, for nodes may have no common disk.
INTERRUPTIONS = "interruptions.jsonl"
NOTICES = "notices.jsonl"
ERRORS = "errors"
# What each layer learned, where something was dropped from it.
LAYERS = "layers.json"


@dataclass(frozen=True)
class TrainJob:
    """All that a training process needs to know.

    Attributes:
        base_folder: the base model.
        prepared: folder of the prepared data.
        work: the folder this stage fills; checkpoints in it are resumed from.
        method: what is put into the base and trained.
        settings: the recipe's `train` section.
        deepspeed: the complete DeepSpeed configuration.
    """

    base_folder: Path
    prepared: Path
    work: Path
    method: Method
    settings: TrainSettings
    deepspeed: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.work / "checkpoints"


def journalled_error(work: Path) -> Record | None:
    """The error that ended training, with its text as `error` and whether the user can mend it as `mistake`."""
    return next((record for file in sorted((work / ERRORS).glob("*.jsonl")) for record in read_journal(file)), None)
