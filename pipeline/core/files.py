"""Small files that are the old one or the new one, never a part of either.

Digests of files that have not changed, so that a tick of the scheduler need not read gigabytes to find nothing new.

A file is known by its path, size, inode and the times of its last change in nanoseconds. That is what `make`, `rsync` and
`git` go by, with git's precaution: a file that changed moments ago is not remembered, for it could change again within
the same tick of the file system's clock. The time of the last change of the inode (ctime) is looked at too, since programs
can set the other back, as `cp -p` and `touch -r` do.

What could still deceive it is a write past the file system: to the device, or on another host whose attributes are cached
here for some seconds. Then a change is noticed a tick late, or a retraining is left out that was due; no wrong model
comes of it. The keys of the stages are made from the bytes alone (`pipeline.run.graph`), never from this cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kasa.file_digest import file_digest

# Folder of the adapter in a training's artifact and in a registered model.
ADAPTER = "adapter"


def atomic_write(file: Path, content: str | bytes) -> None:
    """Write a file in one step, making its folder where there is none. Several may do so at once: the last one stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.new")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, file)


# Longer than the coarsest clock of a file system in use (2 s) and what hosts' clocks are apart.
SETTLED_S = 10.0


@dataclass
class DigestCache:
    """Digests by the state of their files, kept in a JSON file.

    Attributes:
        file: where they are kept between commands.
        known: path -> (size, inode, mtime_ns, ctime_ns, digest).
        seen: those of `known` that were asked for; the others are forgotten at `save`.
        read_bytes: how much had to be read.
    """

    file: Path
    known: dict[str, list[int | str]] = field(default_factory=dict)
    seen: dict[str, list[int | str]] = field(default_factory=dict)
    read_bytes: int = 0

    def digest(self, path: Path) -> str:
        """SHA-256 of a file's bytes, in hexadecimal.

        Raises:
            OSError: it cannot be read.
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
        """Keep what was asked for."""
        if self.seen != self.known:
            atomic_write(self.file, json.dumps(self.seen))


def read_digests(file: Path) -> DigestCache:
    """The cache kept in a file; an empty one where there is none, or a damaged one."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    return DigestCache(file, known if isinstance(known, dict) else {})


def _state(path: Path) -> list[int | str]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def content_digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value in canonical form, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
