"""Where a lease is kept: one small record that several processes, on several hosts, read and change.

Two operations are enough: read, and write on condition that nothing was written since. An object store with conditional
put offers the same (`If-None-Match: *` to create, `If-Match: ETAG` to replace), so a lease works on either.

Leases (`pipeline.storage.lease`) that are kept in the store, so that runs on machines without a common disk keep apart.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.core.errors import WorkspaceError
from pipeline.storage.objects import ObjectStore

# Generations kept behind the newest. A process that read one of them long ago and writes now finds the next one there
# and fails, as it must; it would have to sleep through all of these renewals to find that place empty.
_KEPT = 32


class Entry(NamedTuple):
    """What a store holds: the content, None where there is none; and its version, None where there never was any."""

    content: bytes | None
    version: str | None


class LeaseStore(Protocol):
    """A place for one record."""

    def read(self) -> Entry:
        """The record as it is now."""

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """Create, replace or (with None) delete the record, if its version is still `unchanged`.

        Returns:
            The new version, or None where another was quicker.

        Raises:
            WorkspaceError: the store cannot be written.
        """


class FileLeaseStore:
    """A record in a folder of a POSIX file system, local or shared.

    Each write is a file of its own, `NAME.GENERATION`, made by link(2): that is atomic, and fails where the name exists,
    on NFS too. So "if unchanged" is "if the next generation does not exist". The highest generation is the record.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._pattern = re.compile(re.escape(name) + r"\.(\d{9})")

    def read(self) -> Entry:
        """As `LeaseStore.read`."""
        while True:
            generations = self._generations()
            if not generations:
                return Entry(None, None)
            try:
                content = self._file(generations[-1]).read_bytes()
            except FileNotFoundError:  # cleared away meanwhile by one that wrote many newer
                continue
            return Entry(content or None, str(generations[-1]))

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """As `LeaseStore.write`."""
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
        # If it is not the newest, its place was empty because it had been cleared away long ago.
        return str(mine) if generations[-1] == mine else None

    def _link(self, temporary: Path, place: Path) -> bool:
        try:
            os.link(temporary, place)
        except FileExistsError:
            # NFS: the answer to a link that was made can be lost, and then the repeated request fails.
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
    """One record of a store, as `pipeline.storage.lease_stores.LeaseStore` has it. A record without content is one given back."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name

    def read(self) -> Entry:
        """The record as it is now."""
        content, version = self._store.read(self._name) or (b"", None)
        return Entry(content or None, version)

    def write(self, content: bytes | None, unchanged: str | None) -> str | None:
        """Create, replace or (with None) give back the record if its version is still `unchanged`; the new version."""
        if unchanged is None:
            return self._store.create(self._name, content or b"")
        return self._store.replace(self._name, content or b"", unchanged)
