"""Where a lease is recorded: one small record that processes on several hosts read and change.

Two operations are enough: read, and write if nothing was written since. A shared POSIX file system offers them through
link(2), and an object store through conditional puts (`If-None-Match: *` to create, `If-Match: ETAG` to replace). The
latter excludes each other's runs on machines that share no disk.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.core.errors import WorkspaceError
from pipeline.storage.objects import ObjectStore

# Generations kept besides the newest. A process that read one of them long ago and writes now must find its successor and
# fail. It would have to sleep through this many renewals to find that name free again.
_KEPT = 32


class Entry(NamedTuple):
    """The state of a record: its content (None if it is absent or was deleted) and its version (None if it never existed)."""

    content: bytes | None
    version: str | None


class LeaseStore(Protocol):
    """Holds one record."""

    def read(self) -> Entry:
        """Read the record."""

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """Create, replace or delete the record, if its version is still `unchanged`.

        Args:
            content: The new content; None to delete the record.
            unchanged: The version that was read.

        Returns:
            The new version; None if another process has written meanwhile.

        Raises:
            WorkspaceError: The store cannot be written.
        """


class FileLeaseStore:
    """A record in a folder of a POSIX file system, local or shared.

    Each write creates a file of its own, `NAME.GENERATION`, by link(2), which is atomic and fails if the name exists, on NFS
    too. So "if unchanged" means "if the next generation does not exist". The highest generation is the record.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._pattern = re.compile(re.escape(name) + r"\.(\d{9})")

    def read(self) -> Entry:
        """Read the record."""
        while True:
            generations = self._generations()
            if not generations:
                return Entry(None, None)
            try:
                content = self._file(generations[-1]).read_bytes()
            except FileNotFoundError:  # deleted meanwhile by a process that wrote many newer ones
                continue
            return Entry(content or None, str(generations[-1]))

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """Write the record as `LeaseStore.write` describes."""
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = int(unchanged or 0) + 1
        temporary = self._folder / f".{self._name}.{uuid.uuid4().hex}"
        with temporary.open("wb") as file:
            file.write(content or b"")
            file.flush()
            os.fsync(file.fileno())
        try:
            if not self._link(temporary, self._file(mine)):
                return None
        finally:
            temporary.unlink()
        generations = self._generations()
        for old in generations[:-_KEPT]:
            self._file(old).unlink(missing_ok=True)
        # If it is not the newest, its name was free only because that generation had been deleted long ago.
        return str(mine) if generations[-1] == mine else None

    def _link(self, temporary: Path, place: Path) -> bool:
        try:
            os.link(temporary, place)
        except FileExistsError:
            # NFS: the reply to a successful link can be lost, and the repeated request then fails.
            return temporary.stat().st_nlink == 2
        except OSError as error:
            raise WorkspaceError(
                f"{place} cannot be made ({error.strerror}); the lock of a retraining needs a workspace that can be "
                "written, on a file system with hard links"
            ) from None
        return True

    def _generations(self) -> list[int]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        return sorted(int(found[1]) for name in names if (found := self._pattern.fullmatch(name)))

    def _file(self, generation: int) -> Path:
        return self._folder / f"{self._name}.{generation:09d}"


class ObjectLeaseStore:
    """A record in an object store. An empty object is a deleted record."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name

    def read(self) -> Entry:
        """Read the record."""
        content, version = self._store.read(self._name) or (b"", None)
        return Entry(content or None, version)

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """Write the record as `LeaseStore.write` describes."""
        if unchanged is None:
            return self._store.create(self._name, content or b"")
        return self._store.replace(self._name, content or b"", unchanged)
