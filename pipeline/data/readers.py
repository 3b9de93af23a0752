"""Readers of rows from files: jsonl, json (a list of objects), csv, parquet, txt; all but parquet also packed by gzip.

A damaged file (not UTF-8, broken JSON, a csv cell that never ends) is an error that names the file and line. A row that is
well-formed but unusable is returned with its defect, to be counted.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.core.errors import DataError, one_line
from pipeline.core.redaction import shell_command

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
GZIP = ".gz"
_BUFFER_BYTES = 1 << 20
# What pyarrow raises for a value that Python's types cannot hold.
_NO_PYTHON_VALUE = (ValueError, ArithmeticError, ImportError)


class RawRow(NamedTuple):
    """One row of a file.

    Attributes:
        location: Where it was found: `file:line` or `file:row N`.
        values: Its values by column.
        defect: Why it is unusable; empty if it is usable.
    """

    location: str
    values: dict[str, Any]
    defect: str = ""


def file_format(path: Path) -> str:
    """What a file is read as, one of `FORMATS`, by its name; empty if it cannot be read. `rows.csv.gz` is `.csv`."""
    suffix = path.suffix.lower()
    if suffix == GZIP:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix != ".parquet" and suffix in FORMATS else ""
    return suffix if suffix in FORMATS else ""


def read_rows(path: Path, separator: str | None = None, sha256: str | None = None) -> Iterator[RawRow]:
    """The rows of one file, in the order of the file.

    Args:
        path: A file of one of `FORMATS`.
        separator: For txt only: splits a line into `prompt` and `completion`. Without it a line is `{"text": line}`.
        sha256: The digest that the bytes read must have (hexadecimal); None where only the first rows are wanted.

    Raises:
        DataError: The file is empty, damaged or cannot be read, a separator is given for another format than txt, or, after
            the last row, the bytes that were read had another digest.
    """
    name, kind = shown(path), file_format(path)
    if separator is not None and kind != ".txt":
        raise DataError(f"data.separator {separator!r} is for .txt files, but {name} is none; remove it")
    if not kind:
        raise DataError(
            f"{name}: rows can be read from {', '.join(FORMATS)} files, not from {path.suffix or 'this one'}"
        )
    found, digest = False, hashlib.sha256()
    try:
        with _opened(path, digest if sha256 else None) as file:
            for row in _read_txt(name, file, separator) if kind == ".txt" else _READERS[kind](name, file):
                found = True
                yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} is damaged gzip: {one_line(error)}; copy it again") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from None
    if sha256 and digest.hexdigest() != sha256:
        raise DataError(f"{name} was changed after this run had looked at it; run again when it is complete")
    if not found:
        raise DataError(f"{name} holds no rows; remove it from the recipe or fill it")


def shown(path: Path) -> str:
    """A path in words that any terminal and file can take; bytes of a name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class _Digesting(io.RawIOBase):
    """A file whose bytes go into a digest as they are read, once and in order."""

    def __init__(self, file: io.FileIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count


@contextmanager
def _opened(path: Path, digest: Any) -> Iterator[IO[bytes]]:
    """The content of a file, unpacked. The bytes of the file itself go into the digest, if there is one."""
    with io.FileIO(path) as raw:
        file: Any = raw
        if digest is not None:
            file = _Digesting(raw, digest)
            # Parquet is read from several places, so all of it is taken before.
            file = (
                io.BytesIO(file.read()) if file_format(path) == ".parquet" else io.BufferedReader(file, _BUFFER_BYTES)
            )
        if path.suffix.lower() == GZIP:
            file = gzip.GzipFile(fileobj=io.BufferedReader(file) if file is raw else file)
        yield file if file is not raw else io.BufferedReader(raw)


def _lines(name: str, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends. Only line feeds separate them, because JSON strings may hold other separators."""
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            encoding = "utf-16" if number == 1 and raw.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "latin1"
            raise DataError(
                f"{name}:{number}: byte {error.start + 1} of the line is not UTF-8 (0x{raw[error.start]:02x}); "
                f"convert the file, e.g. `{shell_command('iconv', '-f', encoding, '-t', 'utf-8', Path(name).name)}`"
            ) from None
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def _read_txt(name: str, file: IO[bytes], separator: str | None) -> Iterator[RawRow]:
    for number, line in _lines(name, file):
        text, location = line.strip(), f"{name}:{number}"
        if not text:
            continue
        if separator is None:
            yield RawRow(location, {"text": text})
            continue
        prompt, found, completion = text.partition(separator)
        values = {"prompt": prompt.strip(), "completion": completion.strip()}
        yield RawRow(location, values, "" if found else f"separator {separator!r} is absent")


def _read_jsonl(name: str, file: IO[bytes]) -> Iterator[RawRow]:
    for number, line in _lines(name, file):
        if not line.strip():
            continue
        location = f"{name}:{number}"
        try:
            values = json.loads(line, object_pairs_hook=_distinct)
        except json.JSONDecodeError as error:
            raise DataError(f"{location}: broken JSON: {_reason(error)}; each line must be one object") from None
        except (ValueError, RecursionError) as error:
            yield RawRow(location, {}, _reason(error))
        else:
            yield RawRow(location, _object(values, location))


def _read_json(name: str, file: IO[bytes]) -> Iterator[RawRow]:
    text = "".join(line for _, line in _lines(name, file))
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        if position < len(text):
            raise DataError(
                f"{name}:1: not a list of objects; if it has one object per line name the file .jsonl, and if it is no data "
                "name the data files themselves"
            )
        return
    decoder, line, counted = json.JSONDecoder(object_pairs_hook=_distinct), 1, 0
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted, location = position, f"{name}:{line}"
        try:
            values, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{getattr(error, 'lineno', line)}: broken JSON: {_reason(error)}") from None
        yield RawRow(location, _object(values, location))
        position = _next_item(text, position, name)
    if _skip_space(text, position + 1) != len(text):
        raise DataError(f"{name}: broken JSON: something follows the list; a file must be one list of objects")


def _next_item(text: str, position: int, name: str) -> int:
    position = _skip_space(text, position)
    if text[position : position + 1] == ",":
        return _skip_space(text, position + 1)
    if text[position : position + 1] != "]":
        line = text.count("\n", 0, position) + 1
        raise DataError(f"{name}:{line}: broken JSON: a comma or the end of the list is missing")
    return position


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    if isinstance(error, RecursionError):
        return "objects or lists are nested too deeply"
    return "a number has too many digits" if "digits" in str(error) else str(error)


def _object(values: Any, location: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{location}: a row must be a JSON object with named fields, not {type(values).__name__}")
    return values


def _read_csv(name: str, file: IO[bytes]) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB would end the run at one long document
    reader = csv.reader((line for _, line in _lines(name, file)), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name}:{line}: broken csv: {error}; check the quotes of this row") from None
        if cells is None:
            return
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(header, f"{name}:1")
        elif cells:
            differs = len(cells) != len(header)
            defect = "cells and header differ in number" if differs else ""
            yield RawRow(f"{name}:{line}", dict(zip(header, cells, strict=False)), defect)


def _check_header(header: Sequence[str], location: str) -> None:
    double = sorted({name for name in header if header.count(name) > 1})
    if double:
        raise DataError(f"{location}: column {double[0]!r} occurs twice in the header; rename one")
    separator = next((one for one in (";", "\t", "|") if len(header) == 1 and one in header[0]), None)
    if separator is not None:
        raise DataError(
            f"{location}: the cells of a csv file are separated by commas, and here by {separator!r}; convert the file"
        )


def _read_parquet(name: str, file: IO[bytes]) -> Iterator[RawRow]:
    import pyarrow.parquet

    if not file.seek(0, os.SEEK_END):
        return
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_header(table.schema_arrow.names, name)
            for batch in table.iter_batches(batch_size=1024):
                for values, defect in _batch_rows(batch):
                    number += 1
                    yield RawRow(f"{name}:row {number}", values, defect)
    except DataError:
        raise
    except Exception as error:  # damage of a binary file shows as errors of any kind
        raise DataError(f"{name}: damaged parquet after row {number}: {one_line(error)}") from None


def _batch_rows(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a batch of Arrow, each with why it is unusable: Python has no value for some, such as dates after 9999."""
    try:
        rows = batch.to_pylist()
    except _NO_PYTHON_VALUE:
        pass
    else:
        yield from ((values, "") for values in rows)
        return
    for row in range(batch.num_rows):
        values, defect = {}, ""
        for column, cells in zip(batch.schema.names, batch.columns, strict=True):
            try:
                values[column] = cells[row].as_py()
            except _NO_PYTHON_VALUE:
                defect = f"column {column} has a {cells.type} that cannot be read, such as one out of range"
        yield values, defect


_READERS: dict[str, Callable[[str, IO[bytes]], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
