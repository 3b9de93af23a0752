"""Files and folders that are complete or absent, and the digest of a file's bytes. Imports no tensor library."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path, exclusive: bool = False) -> Iterator[Path]:
    """Write a file or folder in one step: readers see the old one, the new one, and never a part of either.

    The block writes to the path it is given, which lies beside `path` because a rename is atomic only within one file
    system. When the block ends well, the result is moved to `path` and replaces what was there; when it raises, the
    result is deleted. Several processes and threads may do this at once: the last one wins.

    Args:
        path: The file or folder to write. Its parent folder must exist by the end of the block.
        exclusive: The caller holds a lock, so what an earlier writer left behind when it was killed is deleted first.
    """
    if exclusive:
        for left_behind in path.parent.glob(f".{path.name}.*.partial"):
            _delete(left_behind)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    _delete(temporary)  # process ids are used again
    try:
        yield temporary
        if path.is_dir():
            remove_folder(path)  # a rename replaces a file, but only an empty folder
        os.replace(temporary, path)
    finally:
        _delete(temporary)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that half of it never stands under its name: it is renamed first."""
    aside = folder.with_name(f".{folder.name}.{uuid4().hex}.old")
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()
