"""Who hangs: found out by the others, after a collective operation has timed out.

Whoever waited answers by a file. A rank that hangs does not, so it is the one to name.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch.distributed as dist

from pipeline.errors import WorkerError

_PATIENCE_S = 10.0


class RollCall:
    """Answers of one attempt's ranks in `folder`, which all of them see; made by every rank before training."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()

    def name_the_silent(self, timeout: BaseException) -> None:
        """After a time-out: answer, and wait for the others' answers.

        Raises:
            WorkerError: ranks that do not answer, by number.
        """
        self._folder.mkdir(parents=True, exist_ok=True)  # on a node without rank 0 there may be none yet
        (self._folder / str(self._rank)).touch()
        deadline = time.monotonic() + _PATIENCE_S
        while silent := self._silent():
            if time.monotonic() > deadline:
                ranks = ", ".join(map(str, silent))
                raise WorkerError(
                    f"training worker {ranks} hangs: the others waited for it as long as train.collective_timeout_s allows"
                ) from timeout
            time.sleep(0.1)

    def _silent(self) -> list[int]:
        return [rank for rank in range(self._world) if not (self._folder / str(rank)).exists()]
