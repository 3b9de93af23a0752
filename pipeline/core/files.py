"""The files of a workspace: where they lie, how they are written, their digests, and journals.

The digest cache spares a scheduled retraining from reading gigabytes to find nothing new. It knows a file by its path,
size, inode and the times of its last change in nanoseconds. That is what `make`, `rsync` and `git` go by, with git's
precaution: a file that changed moments ago is not remembered, for it could change again within the same tick of the file
system's clock. The time of the inode's last change (ctime) counts too, since `cp -p` and `touch -r` set the other back.
A write past the file system (to the device, or on another host whose attributes are cached here for some seconds) can
still deceive the cache. A change is then noticed one tick of the scheduler late. No wrong model comes of it: the keys of
the stages are computed from the bytes alone, never from this cache.

A journal is an append-only file of JSON lines in which a worker records what it has done, for the driver and for a restart.
One process writes it, any number of processes read it, also on shared storage. Readers ignore a torn last line (its writer
was killed), and the next writer cuts it off. Each line ends with a check sum of itself: a damaged one counts as never written,
and what it recorded is done again. A writer that outlives its driver, while a new one has taken the journal over,
writes to a file that nobody reads any more (`JournalWriter`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kasa.files import file_digest, replacing
from pipeline.core.redaction import redacted

# Names within a workspace. Unfinished work lies beside its final folder, under a name that ends in `PARTIAL`.
ARTIFACTS, INPUTS = "artifacts", "inputs"
PARTIAL = ".partial"
# Folder of the adapter in a training's artifact and in a registered model.
ADAPTER = "adapter"
# This file says that an uploaded input is complete.
COMPLETE = ".complete"

# Longer than the tick of the coarsest file system clock in use (2 s) and the usual skew between hosts.
SETTLED_S = 10.0

_FILE = "file://"

Record = dict[str, Any]


def is_remote(location: Path | str) -> bool:
    """Whether a workspace is named by the URL of an object store. `file://` URLs name local folders."""
    return "://" in str(location) and not str(location).startswith(_FILE)


def user_path(text: Path | str) -> Path:
    """A path as people write it: `~` stands for their home folder. A `~` of somebody who is not known here stays as it is."""
    return Path(os.path.expanduser(text))


def local_folder(location: Path | str) -> Path:
    """The folder of a workspace on this node. Nothing is created.

    A remote workspace has a copy below `$KASA_CACHE` (`~/.cache/kasa`), in a folder named after its URL.
    """
    if not is_remote(location):
        return user_path(str(location).removeprefix(_FILE))
    url = redacted(str(location)).rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2])[-40:].strip("-")
    return machine_cache() / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def machine_cache() -> Path:
    """The folder in which this machine keeps what any run of this user may use again: `$KASA_CACHE` (`~/.cache/kasa`)."""
    return user_path(os.environ.get("KASA_CACHE") or "~/.cache/kasa").resolve()


def workspace_option(location: Path | str) -> list[str]:
    """The words that name a workspace on the command line of a command that is printed; none for the default."""
    return [] if str(location) == "workspace" else ["--workspace", str(location)]


def atomic_write(file: Path, content: str | bytes) -> None:
    """Write a file in one step, creating its folder if it is missing. Of several concurrent writers the last one wins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def make_once(path: Path, make: Callable[[Path], None]) -> Path:
    """Return `path`; if there is nothing yet, let one process at a time make it.

    Args:
        make: Writes the file or folder to the path it is given, which is then moved to `path`.
    """
    from filelock import FileLock  # it imports asyncio, which a run that finds everything made does without

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                with replacing(path, exclusive=True) as new:
                    make(new)
    return path


def content_digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value in canonical form, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass
class DigestCache:
    """Digests of files by the state the files were in, kept in a JSON file between commands.

    Attributes:
        file: The JSON file.
        known: Path -> [size, inode, mtime_ns, ctime_ns, digest], as read from the file.
        seen: The entries that were asked for in this process. `save` forgets all others.
        read_bytes: How many bytes had to be read because their digest was not known.
    """

    file: Path
    known: dict[str, list[int | str]] = field(default_factory=dict)
    seen: dict[str, list[int | str]] = field(default_factory=dict)
    read_bytes: int = 0

    def digest(self, path: Path) -> str:
        """SHA-256 of a file's bytes, in hexadecimal.

        Raises:
            OSError: The file cannot be read.
        """
        name = str(path.resolve())
        # Before the bytes are read: a change in between makes the entry useless, not wrong.
        state = _state(path)
        entry = self.known.get(name)
        if entry is None or entry[:-1] != state:
            entry = [*state, file_digest(path)]
            self.read_bytes += int(state[0])
        if time.time() - max(int(state[2]), int(state[3])) / 1e9 > SETTLED_S:
            self.seen[name] = entry
        return str(entry[-1])

    def save(self) -> None:
        """Write the entries that were asked for to the JSON file."""
        if self.seen != self.known:
            atomic_write(self.file, json.dumps(self.seen))


def read_digests(file: Path) -> DigestCache:
    """Read the cache from a JSON file. A missing or damaged file gives an empty cache."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    return DigestCache(file, known if isinstance(known, dict) else {})


def _state(path: Path) -> list[int | str]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def read_journal(path: Path) -> list[Record]:
    """All complete records, oldest first; an empty list if the file does not exist."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return list(_records(data[: data.rfind(b"\n") + 1]))


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
        return list(_records(complete))


def _lines(records: list[Record]) -> bytes:
    return b"".join(_line(json.dumps(record).encode()) for record in records)


def _line(record: bytes) -> bytes:
    return b'%s, "check": "%08x"}\n' % (record[:-1], zlib.crc32(record))


def _records(lines: bytes) -> Iterator[Record]:
    """The records of the lines that are as they were written."""
    for line in lines.splitlines(keepends=True):
        record = line.rpartition(b', "check": ')[0] + b"}"
        if _line(record) == line:
            yield json.loads(record)
