"""The local files that `data.train`, `data.heldout` and `data.calibration` name, with the digests of their bytes.

Of a folder or a pattern, files that are no data (a README, descriptions such as dataset_info.json) are passed over, and a
line names them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kasa.errors import nearest
from kasa.files import file_digest
from pipeline.config.settings import DataSettings
from pipeline.core.console import console
from pipeline.core.errors import DataError
from pipeline.core.files import user_path
from pipeline.data.forms import check_form
from pipeline.data.readers import FORMATS, file_format, shown
from pipeline.data.remote import PREFIX as HUB
from pipeline.data.remote import PREFIXES as WEB
from pipeline.data.remote import hub_file, parse_entry, web_file
from pipeline.models.embedded import PREFIX as EMBEDDED
from pipeline.models.embedded import embedded_data, embedded_path_if_present

# Files beside data that only describe it.
_DESCRIPTION = re.compile(
    r"(readme.*|(licen[cs]e|copying|notice|changelog|citation|authors|contributing|requirements)(\.[a-z]+)?)\.(txt|json)"
    r"|(dataset_infos?|dataset_dict|state|croissant|datapackage)\.json",
    re.IGNORECASE,
)
# Data in these is not read, and too likely meant to be passed over.
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z")
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class SourceFile:
    """A file to read and the sha256 of its bytes (hexadecimal)."""

    path: Path
    sha256: str

    @property
    def kind(self) -> str:
        """The format that the file is read as: a suffix in lower case, with the dot."""
        return file_format(self.path)

    def check_unchanged(self) -> None:
        """Make sure that the file still holds the bytes of the digest.

        Raises:
            DataError: it does not.
        """
        if file_digest(self.path) != self.sha256:
            raise DataError(
                f"{self.path} was changed while the run read it; leave it as it is and run the same command again"
            )


@dataclass(frozen=True)
class DataSources:
    """The files of all sides.

    Attributes:
        train: The files to train on.
        heldout: The held-out files; empty if samples are to be split off from `train`.
        calibration: The files whose text truncation looks at; empty if `train` serves for it.
    """

    train: tuple[SourceFile, ...]
    heldout: tuple[SourceFile, ...] = ()
    calibration: tuple[SourceFile, ...] = ()

    @property
    def sides(self) -> tuple[tuple[Path, ...], ...]:
        """The paths of each side, those to train on first."""
        return tuple(tuple(file.path for file in side) for side in (self.train, self.heldout, self.calibration))

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files of all sides."""
        return self.train + self.heldout + self.calibration

    @property
    def digest(self) -> str:
        """SHA-256 over the contents. It does not depend on where the files lie, on their order, or on when they were written."""
        sides = [
            sorted((file.kind, file.sha256) for file in side) for side in (self.train, self.heldout, self.calibration)
        ]
        return hashlib.sha256(json.dumps(sides).encode()).hexdigest()


def resolve_sources(
    settings: DataSettings, workspace: Path, fetch: bool = True, digest: Callable[[Path], str] = file_digest
) -> DataSources | None:
    """Find the files, fetching `hub:`, `embedded:` and `https://` entries into `<workspace>/sources` where they are absent.

    With `fetch` false nothing is written, and the answer is None where something would have to be fetched. `digest` gives
    the sha256 of a file's bytes (hexadecimal).

    Raises:
        RecipeError: there is no such `data.form`.
        DataError: a file is missing or of an unknown format, a pattern matches nothing, or a source cannot be fetched.
        WorkspaceError: what was fetched cannot be stored.
    """
    check_form(settings)
    sides: list[tuple[SourceFile, ...]] = []
    for side in ("train", "heldout", "calibration"):
        key, entries = f"data.{side}", getattr(settings, side)
        paths: dict[Path, None] = {}
        for entry in entries:
            found = resolve_source(entry, key, workspace, fetch)
            if found is None:
                return None
            paths |= dict.fromkeys(found)
        sides.append(tuple(SourceFile(path, _sha256(path, digest)) for path in paths))
    if not sides[0]:
        raise DataError(
            "data.train names no source; give a file, a pattern, a folder, hub:NAME, an https address or embedded:NAME"
        )
    return DataSources(*sides)


def resolve_source(entry: str, key: str, workspace: Path, fetch: bool) -> list[Path] | None:
    """The files of one entry of the recipe's key `key`. Arguments and errors are those of `resolve_sources`."""
    if entry.startswith(EMBEDDED):
        present = embedded_path_if_present(entry, workspace)
        if present is None and fetch:
            present = embedded_data(entry, workspace)
        return None if present is None else [present]
    if entry.startswith(HUB):
        exported = hub_file(parse_entry(entry, key), workspace, fetch)
        return None if exported is None else [exported]
    if entry.startswith(WEB):
        fetched = web_file(entry, key, workspace, fetch)
        return None if fetched is None else [_checked(fetched, key)]
    return _local_files(entry, key)


def _local_files(entry: str, key: str) -> list[Path]:
    path = user_path(entry)
    if path.is_dir():
        files = _data_among(_files_below(path), path, f"{key}: folder {entry}")
        if not files:
            raise DataError(f"{key}: folder {entry} holds no {', '.join(FORMATS)} file")
        return files
    if path.is_file():
        return [_checked(path, key)]
    if glob.has_magic(entry):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = _data_among(matches, None, f"{key}: pattern {entry}")
        if not files:
            raise DataError(f"{key}: pattern {entry} matches no file{_nearest_file(path)}")
        return [_checked(file, key) for file in files]
    raise DataError(f"{key}: {entry} does not exist (relative to {Path.cwd()}){_nearest_file(path)}")


def _files_below(folder: Path) -> list[Path]:
    """All files below a folder, and the folders that are links, sorted. What is hidden is left out unless it may be data."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror or error}")

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        found += [Path(place, name) for name in files]
        found += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
    return sorted(path for path in found if file_format(path) or not _is_hidden(path.relative_to(folder)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _data_among(found: Iterable[Path], folder: Path | None, subject: str) -> list[Path]:
    """The data files among those found; the others are named.

    Args:
        folder: that of the recipe, of which files of other formats and hidden ones are passed over; None for a pattern.
        subject: of the line, and of errors.

    Raises:
        DataError: a file is certainly data but cannot be read.
    """
    files: list[Path] = []
    others: list[str] = []
    for path in found:
        name = path.relative_to(folder) if folder else path
        if path.is_dir() or _DESCRIPTION.fullmatch(path.name) or (folder and _is_hidden(name)):
            others.append(shown(name))
        elif not path.is_file():
            raise DataError(f"{subject}: {shown(path)} is a link that leads nowhere, or no file; mend or remove it")
        elif file_format(path) or not folder:
            files.append(path)
        elif path.suffix.lower() in _PACKED and file_format(path.with_suffix("")):
            raise DataError(
                f"{subject}: {shown(path)} cannot be read as it is packed; unpack it, or name the files to read"
            )
        else:
            others.append(shown(name))
    if others:
        more = f" and {len(others) - _NAMES_SHOWN} more" if len(others) > _NAMES_SHOWN else ""
        _say(f"{subject}: not read as data: {', '.join(others[:_NAMES_SHOWN])}{more}")
    return files


@cache
def _say(line: str) -> None:
    """Print a line, once in a process: several parts of a command ask for the same sources."""
    console.print(line, markup=False, soft_wrap=True)


def _checked(path: Path, key: str) -> Path:
    if not file_format(path):
        raise DataError(f"{key}: {path} is of no known format; there is {', '.join(FORMATS)}")
    return path


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder}" if not glob.has_magic(str(folder)) else ""
    return nearest(path.name, [file.name for file in folder.iterdir()])


def _sha256(path: Path, digest: Callable[[Path], str]) -> str:
    try:
        return digest(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
