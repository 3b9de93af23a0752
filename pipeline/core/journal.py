"""An append-only JSON-lines file: how a worker tells the driver what it has done, and how a restart knows it too.

One process writes, any process reads, on shared storage if need be. A torn last line (the writer was killed) is ignored
by readers and cut off before the next append. A writer that outlives its driver, while a new one has taken the journal
over, writes to a file that nobody reads any more (`JournalWriter`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.files import atomic_write

Record = dict[str, Any]


def read_journal(path: Path) -> list[Record]:
    """All complete records, oldest first; empty where the file does not exist."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def rewrite_journal(path: Path, keep: Callable[[Record], bool]) -> list[Record]:
    """Keep the records for which `keep` holds, in one atomic step; returns them."""
    records = [record for record in read_journal(path) if keep(record)]
    atomic_write(path, _lines(records))
    return records


def append_journal(path: Path, records: list[Record]) -> None:
    """Append records; durable against the death of this process once the call returns."""
    with path.open("ab") as file:
        file.write(_lines(records))


class JournalWriter:
    """Takes a journal over, keeping the records for which `keep` holds; whoever wrote it before is cut off.

    Attributes:
        kept: the records that were kept.
    """

    def __init__(self, path: Path, keep: Callable[[Record], bool]) -> None:
        self.kept = rewrite_journal(path, keep)
        self._path = path
        # Held open: once another writer has replaced the file, this one goes on in the file that was.
        self._file = path.open("ab")

    def append(self, records: list[Record]) -> None:
        """As `append_journal`."""
        self._file.write(_lines(records))
        self._file.flush()

    def is_current(self) -> bool:
        """Whether nobody else has taken the journal over."""
        return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))


class JournalTail:
    """Reads what is new since the last call, also after the file was rewritten (then everything, from its start)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = -1
        self._offset = 0

    def new_records(self) -> list[Record]:
        """Complete records not returned before."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


def _lines(records: list[Record]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
