"""The contract between the driver and the training workers: the job, and the files in its folder.

The driver imports this module, so it must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.training import TrainSettings
from pipeline.core.journal import Record, read_journal

if TYPE_CHECKING:
    from pipeline.methods.method import Method

# Written by rank 0: one record per optimizer step.
JOURNAL = "journal.jsonl"
# Folder of `HangDetector`.
ROLL_CALL = "roll-call"
# Written by rank 0 when it has attached the method: `trainable_parameters`, and `attach_s` in seconds.
ATTACHED = "attached.json"
# Worker failures (by the driver), nodes about to leave (by rank 0), and errors that no retry mends (a file per rank). Each file
# has one writer, because nodes may have no common disk.
INTERRUPTIONS = "interruptions.jsonl"
NOTICES = "notices.jsonl"
ERRORS = "errors"
# Singular values of each layer, what it learned beside what it lost (`write_layers`).
LAYERS = "layers.json"


@dataclass(frozen=True)
class TrainJob:
    """All that a training process needs to know.

    Attributes:
        base_folder: the base model.
        prepared: folder of the prepared data.
        work: the folder that training fills, and resumes from.
        method: the method to attach and train.
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
        """The folder of the checkpoints."""
        return self.work / "checkpoints"


def journalled_error(work: Path) -> Record | None:
    """The first error that no retry mends: its text as `error`, and as `mistake` whether it is the user's. None without one."""
    return next((record for file in sorted((work / ERRORS).glob("*.jsonl")) for record in read_journal(file)), None)
