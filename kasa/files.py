"""Files and folders that are complete or absent, and digests by which damage is noticed. Imports no tensor library.

A sealed JSON file holds, beside its values, the digest of all of them. A sealed folder holds a sealed file with the digests
of all others, also of those in sealed folders below it. So a byte that changed on the disk is noticed where the file is read,
whatever it meant.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from kasa.errors import DamagedFileError

# Lists the other files of a sealed folder.
FOLDER_SEAL = "files.json"
_SEAL = "sha256"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed_json(values: Mapping[str, Any]) -> str:
    """The text of a JSON file with these values and the digest of them all."""
    read_back = json.loads(json.dumps(values))  # names that are numbers become text, and sort as such
    return json.dumps({**read_back, _SEAL: _digest(read_back)}, indent=1, sort_keys=True)


def read_sealed_json(file: Path) -> dict[str, Any]:
    """The values of a sealed JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not what was written.
    """
    values = read_json(file)
    assert isinstance(values, dict)
    if values.pop(_SEAL, None) != _digest(values):
        raise DamagedFileError(f"{file} was changed after it was written: its digest is another")
    return values


def read_json(file: Path, kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    """The object or the list that a JSON file of ours holds.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{file} is damaged: {error}") from None
    if not isinstance(value, kind):
        raise DamagedFileError(f"{file} is damaged: it holds no JSON {'object' if kind is dict else 'list'}")
    return value


def file_digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """The digests of files by their places in the folder."""
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in sorted(files)}


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare the files of a folder with what they were.

    Raises:
        DamagedFileError: naming the first file that is missing, cannot be read, or was changed.
    """
    for name, digest in digests.items():
        try:
            found = file_digest(folder / name)
        except OSError as error:
            raise DamagedFileError(f"{folder / name} cannot be read: {error.strerror}") from None
        if found != digest:
            raise DamagedFileError(
                f"{folder / name} was changed after it was written, or cut off: its digest is another"
            )


def seal_folder(folder: Path) -> None:
    """Write down the digests of all files of a folder, in the folder."""
    files = (file for file in folder.rglob("*") if file.is_file() and file != folder / FOLDER_SEAL)
    with replacing(folder / FOLDER_SEAL) as new:
        new.write_text(sealed_json({"files": file_digests(folder, files)}), encoding="utf-8")


def check_sealed_folder(folder: Path, must_be_sealed: bool = False) -> None:
    """Compare a folder with what it was when it was sealed; one that never was is not looked at, unless it must be sealed.

    Raises:
        DamagedFileError: naming what was changed, or the list of digests where that is missing and must be there.
    """
    try:
        digests = read_sealed_json(folder / FOLDER_SEAL)["files"]
    except FileNotFoundError:
        if must_be_sealed:
            raise DamagedFileError(f"{folder / FOLDER_SEAL}, the list of the digests, is missing") from None
        return
    check_digests(folder, digests)


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
        for left_behind in path.parent.glob(f".{path.name}.*.partial*"):
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


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
