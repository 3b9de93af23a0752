"""Finding the rank that hangs after a collective operation has timed out.

Every rank that waited answers by a file. A rank that hangs does not answer, so it is the one to name in the error.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import torch.distributed as dist

from pipeline.core.errors import WorkerError

# The ranks time out within seconds of one another.
_ANSWER_TIMEOUT_S = 10.0


class HangDetector:
    """The answers of all ranks of one attempt, as files in a folder.

    From the start `RANK.process` holds the process id and host of each rank, for a person who wants to inspect one that is
    stuck.
    """

    def __init__(self, folder: Path) -> None:
        """Begin with an empty `folder`, which all ranks can see; collective, before training."""
        self._folder = folder
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        folder.mkdir(parents=True, exist_ok=True)  # a node without rank 0 may have a disk of its own
        self._process_file(self._rank).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def raise_for_missing_ranks(self, timeout: BaseException) -> None:
        """Answer after a time-out, and wait for the answers of the others.

        Args:
            timeout: the error of the collective operation.

        Raises:
            WorkerError: some ranks do not answer; it names them by number and process.
        """
        (self._folder / str(self._rank)).touch()
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while missing := self._missing_ranks():
            if time.monotonic() > deadline:
                workers = ", ".join(f"{rank}{self._process_of(rank)}" for rank in missing)
                raise WorkerError(
                    f"training worker {workers} hangs: the others waited for it as long as train.collective_timeout_s"
                    " allows"
                ) from timeout
            time.sleep(0.1)

    def _missing_ranks(self) -> list[int]:
        return [rank for rank in range(self._world) if not (self._folder / str(rank)).exists()]

    def _process_of(self, rank: int) -> str:
        file = self._process_file(rank)
        return f" ({file.read_text(encoding='utf-8')})" if file.exists() else ""

    def _process_file(self, rank: int) -> Path:
        return self._folder / f"{rank}.process"
