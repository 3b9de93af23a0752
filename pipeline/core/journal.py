"""Journals: append-only files of JSON lines in which a worker records what it has done, for the driver and for a restart.

One process writes a journal, any number of processes read it, also on shared storage. Readers ignore a torn last line
(its writer was killed), and the next writer cuts it off. A writer that outlives its driver, while a new one has taken the
journal over, writes to a file that nobody reads any more (`JournalWriter`).
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
    """All complete records, oldest first; an empty list if the file does not exist."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def rewrite_journal(path: Path, keep: Callable[[Record], bool]) -> list[Record]:
    """Reduce the journal to the records for which `keep` holds, in one atomic step, and return them."""
    records = [record for record in read_journal(path) if keep(record)]
    atomic_write(path, _lines(records))
    return records


def append_journal(path: Path, records: list[Record]) -> None:
    """Append records. They survive the death of this process once the call has returned."""
    with path.open("ab") as file:
        file.write(_lines(records))


class JournalWriter:
    """Takes a journal over and appends to it. Whoever wrote to it before reaches no reader any more.

    Attributes:
        kept: The earlier records for which `keep` held. All others are gone.
    """

    def __init__(self, path: Path, keep: Callable[[Record], bool]) -> None:
        self.kept = rewrite_journal(path, keep)
        self._path = path
        # Held open: once another writer has replaced the file, this one keeps writing to the unlinked old file.
        self._file = path.open("ab")

    def append(self, records: list[Record]) -> None:
        """Append records, as `append_journal` does."""
        self._file.write(_lines(records))
        self._file.flush()

    def is_current(self) -> bool:
        """Whether no other writer has taken the journal over."""
        return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))


class JournalTail:
    """Reads what was appended since the last call. After a rewrite of the journal it starts again from the first record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = -1
        self._offset = 0

    def new_records(self) -> list[Record]:
        """The complete records that were not returned before."""
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
