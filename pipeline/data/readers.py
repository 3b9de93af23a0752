"""Readers of rows from files: jsonl, json (a list of objects), csv, parquet, txt.

A damaged file (not UTF-8, broken JSON, a csv cell that never ends) is an error that names the file and line. A row that is
well-formed but unusable is returned with its defect, to be counted.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import DataError
from pipeline.core.redaction import shell_command

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


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


def read_rows(path: Path, separator: str | None = None) -> Iterator[RawRow]:
    """The rows of one file, in the order of the file.

    Args:
        path: A file with one of `SUFFIXES`.
        separator: For txt only: splits a line into `prompt` and `completion`. Without it a line is `{"text": line}`.

    Raises:
        DataError: The file is empty, damaged or cannot be read, or a separator is given for another format than txt.
    """
    suffix = path.suffix.lower()
    if separator is not None and suffix != ".txt":
        raise DataError(f"data.separator {separator!r} is for .txt files, but {path} is none; remove it")
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: rows can be read from {', '.join(SUFFIXES)} files, not from {suffix or 'this one'}")
    found = False
    try:
        for row in _read_txt(path, separator) if suffix == ".txt" else _READERS[suffix](path):
            found = True
            yield row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not found:
        raise DataError(f"{path} holds no rows; remove it from the recipe or fill it")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends. Only line feeds separate them, because JSON strings may hold other separators."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8 (0x{raw[error.start]:02x}); "
                    f"convert the file, e.g. `{shell_command('iconv', '-f', 'latin1', '-t', 'utf-8', path.name)}`"
                ) from None
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def _read_txt(path: Path, separator: str | None) -> Iterator[RawRow]:
    for number, line in _lines(path):
        text, location = line.strip(), f"{path}:{number}"
        if not text:
            continue
        if separator is None:
            yield RawRow(location, {"text": text})
            continue
        prompt, found, completion = text.partition(separator)
        values = {"prompt": prompt.strip(), "completion": completion.strip()}
        yield RawRow(location, values, "" if found else f"separator {separator!r} is absent")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        location = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{location}: broken JSON: {_reason(error)}; each line must be one object") from None
        yield RawRow(location, _object(values, location))


def _read_json(path: Path) -> Iterator[RawRow]:
    text = "".join(line for _, line in _lines(path))
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        if position < len(text):
            raise DataError(f"{path}:1: not a list of objects; for one object per line name the file .jsonl")
        return
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted, location = position, f"{path}:{line}"
        try:
            values, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{getattr(error, 'lineno', line)}: broken JSON: {_reason(error)}") from None
        yield RawRow(location, _object(values, location))
        position = _next_item(text, position, path)
    if _skip_space(text, position + 1) != len(text):
        raise DataError(f"{path}: broken JSON: something follows the list; a file must be one list of objects")


def _next_item(text: str, position: int, path: Path) -> int:
    position = _skip_space(text, position)
    if text[position : position + 1] == ",":
        return _skip_space(text, position + 1)
    if text[position : position + 1] != "]":
        line = text.count("\n", 0, position) + 1
        raise DataError(f"{path}:{line}: broken JSON: a comma or the end of the list is missing")
    return position


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _reason(error: Exception) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _object(values: Any, location: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{location}: a row must be a JSON object with named fields, not {type(values).__name__}")
    return values


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB would end the run at one long document
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{line}: broken csv: {error}; check the quotes of this row") from None
        if cells is None:
            return
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(header, path)
        elif cells:
            differs = len(cells) != len(header)
            defect = "cells and header differ in number" if differs else ""
            yield RawRow(f"{path}:{line}", dict(zip(header, cells, strict=False)), defect)


def _check_header(header: list[str], path: Path) -> None:
    double = sorted({name for name in header if header.count(name) > 1})
    if double:
        raise DataError(f"{path}:1: column {double[0]!r} occurs twice in the header; rename one")


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    if not path.stat().st_size:
        return
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}:row {number}", values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged parquet after row {number}: {' '.join(str(error).split())}") from None


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
