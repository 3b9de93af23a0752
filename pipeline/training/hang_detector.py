"""Who hangs: found out by the others, after a collective operation has timed out.

Whoever waited answers by a file. A rank that hangs does not, so it is the one to name.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import torch.distributed as dist

from pipeline.core.errors import WorkerError

_PATIENCE_S = 10.0


class HangDetector:
    """Answers of one attempt's ranks in `folder`, which all of them see; made by every rank before training.

    From the start it says in `RANK.process` where every rank runs, for whoever wants to look into a process that is stuck.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        folder.mkdir(parents=True, exist_ok=True)  # on a node without rank 0 there may be none yet
        self._process_file(self._rank).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def raise_for_missing_ranks(self, timeout: BaseException) -> None:
        """After a time-out: answer, and wait for the others' answers.

        Raises:
            WorkerError: ranks that do not answer, by number and process.
        """
        (self._folder / str(self._rank)).touch()
        deadline = time.monotonic() + _PATIENCE_S
        while silent := self._silent():
            if time.monotonic() > deadline:
                workers = ", ".join(f"{rank}{self._whereabouts(rank)}" for rank in silent)
                raise WorkerError(
                    f"training worker {workers} hangs: the others waited for it as long as train.collective_timeout_s"
                    " allows"
                ) from timeout
            time.sleep(0.1)

    def _silent(self) -> list[int]:
        return [rank for rank in range(self._world) if not (self._folder / str(rank)).exists()]

    def _whereabouts(self, rank: int) -> str:
        file = self._process_file(rank)
        return f" ({file.read_text(encoding='utf-8')})" if file.exists() else ""

    def _process_file(self, rank: int) -> Path:
        return self._folder / f"{rank}.process"
