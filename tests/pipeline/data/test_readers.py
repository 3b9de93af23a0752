"""Rows and their places come out right; a damaged file is named with its line."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.core.errors import DataError
from pipeline.data.readers import read_rows


def _twice(column: str) -> bytes:
    """A parquet file with two columns of one name."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=[column, column]), file)
    return file.getvalue()


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl_counts_blank_lines_and_keeps_odd_line_separators(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '\ufeff{"text": "one\u2028two"}\r\n\n{"text": "three"}')
    rows = list(read_rows(path))
    assert [row.values["text"] for row in rows] == ["one\u2028two", "three"]
    assert [row.location for row in rows] == [f"{path}:1", f"{path}:3"]


def test_json_items_are_located_by_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[\n  {"text": "one"},\n  {"text":\n   "two"}\n]\n')
    assert [(row.location, row.values) for row in read_rows(path)] == [
        (f"{path}:2", {"text": "one"}),
        (f"{path}:3", {"text": "two"}),
    ]


def test_csv_locates_rows_after_quoted_line_breaks_and_marks_ragged_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'prompt,completion\n"one\nmore",a\ntwo\n\nthree,c\n')
    rows = list(read_rows(path))
    assert [row.location for row in rows] == [f"{path}:2", f"{path}:4", f"{path}:6"]
    assert rows[0].values == {"prompt": "one\nmore", "completion": "a"}
    assert [bool(row.defect) for row in rows] == [False, True, False]


def test_csv_takes_long_cells(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text\n" + "x" * 200_000)
    assert len(next(read_rows(path)).values["text"]) == 200_000


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"messages": [[{"role": "user", "content": "x"}], []]}), path)
    rows = list(read_rows(path))
    assert rows[0] == (f"{path}:row 1", {"messages": [{"role": "user", "content": "x"}]}, "")
    assert rows[1].location == f"{path}:row 2"


def test_txt_splits_at_the_first_separator(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one||two||three \n\nfour\n")
    first, second = read_rows(path, "||")
    assert first.values == {"prompt": "one", "completion": "two||three"}
    assert not first.defect
    assert second.location == f"{path}:3"
    assert "'||' is absent" in second.defect
    assert next(read_rows(path)).values == {"text": "one||two||three"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', ":2: broken JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', ":2: a row must be a JSON object"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xe9"}\n', ":3: byte 8 of the line is not UTF-8 (0xe9)"),
        ("a.jsonl", "\n \n", "holds no rows"),
        ("a.json", '[{"a": 1},\n3]', ":2: a row must be a JSON object"),
        ("a.json", '{"a": 1}', "not a list of objects"),
        ("a.json", '[{"a": ' + "9" * 5000 + "}]", ":1: broken JSON: a number has too many digits"),
        ("a.json", '[{"a": ' + "[" * 100_000, ":1: broken JSON: objects or lists are nested too deeply"),
        ("a.json", '[{"a": 1, "a": 2}]', ":1: broken JSON: a key occurs twice"),
        ("a.jsonl.gz", '{"a": 1}', "damaged gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-9], "damaged gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{', mtime=0), ":2: broken JSON"),
        ("a.parquet.gz", "x", "not from .gz"),
        ("a.parquet", _twice("text"), "column 'text' occurs twice"),
        ("a.json", '[\n{"a": 1}\n{"b": 2}]', ":3: broken JSON"),
        ("a.json", '[\n{"a": 1},\n', "broken JSON"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", '[{"a": 1}] x', "something follows the list"),
        ("a.csv", 'a,b\n1,2\n3,"open\n', ":3: broken csv"),
        ("a.csv", "a,a\n1,2\n", "column 'a' occurs twice"),
        ("a.csv", b"a\nb\n\xff\n", ":3: byte 1 of the line is not UTF-8"),
        ("a.csv", "a;b\n1;2\n", ":1: the cells of a csv file are separated by commas, and here by ';'"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "(0xff); convert the file, e.g. `iconv -f utf-16 -t utf-8 a.jsonl`"),
        ("a.parquet", "no parquet", "damaged parquet"),
        ("a.txt", "", "holds no rows"),
        ("a.xml", "<a/>", "not from .xml"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_unusable_values_are_defects_of_their_row(tmp_path: Path) -> None:
    lines = ['{"a": ' + "9" * 5000 + "}", "[" * 100_000, '{"a": 1, "a": 2}', '{"a": 1}']
    found = list(read_rows(write(tmp_path, "a.jsonl", "\n".join(lines))))
    assert [row.defect for row in found] == [
        "a number has too many digits",
        "objects or lists are nested too deeply",
        "a key occurs twice in one object",
        "",
    ]
    path = tmp_path / "a.parquet"
    days = pa.array([0, 2**31 - 1, 1], pa.date32())
    pyarrow.parquet.write_table(pa.table({"text": ["x", "y", "z"], "day": days}), path)
    found = list(read_rows(path))
    assert ["column day has a date32[day] that cannot be read" in row.defect for row in found] == [False, True, False]
    assert [row.values["text"] for row in found] == ["x", "y", "z"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_packed_files_have_the_rows_of_plain_ones(tmp_path: Path, name: str) -> None:
    content = {"a.jsonl": '{"text": "x"}\n', "a.json": '[{"text": "x"}]', "a.csv": "text\nx\n", "a.txt": "x\n"}[name]
    plain, packed = write(tmp_path, name, content), write(tmp_path, f"{name}.GZ", gzip.compress(content.encode()))
    assert [row.values for row in read_rows(plain)] == [row.values for row in read_rows(packed)] == [{"text": "x"}]
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    assert list(read_rows(packed, sha256=digest)) == list(read_rows(packed))


def _as_parquet(text: str) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": [text]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.jsonl", b'{"text": "x"}\n', b'{"text": "y"}\n'),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0), gzip.compress(b'{"text": "y"}', mtime=0)),
        ("a.parquet", _as_parquet("x"), _as_parquet("y")),
        ("a.csv", b"text\nx\n", b""),
    ],
)
def test_what_was_read_is_what_the_digest_stands_for(tmp_path: Path, name: str, before: bytes, after: bytes) -> None:
    path = write(tmp_path, name, before)
    digest = hashlib.sha256(before).hexdigest()
    assert len(list(read_rows(path, sha256=digest))) == 1
    path.write_bytes(after)
    with pytest.raises(DataError, match="was changed after this run had looked at it"):
        list(read_rows(path, sha256=digest))


def test_names_that_are_not_utf8_are_shown_escaped(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"a\xff.txt")
    path.write_text("x\n")
    (row,) = read_rows(path)
    assert row.location.endswith(r"a\udcff.txt:1") or row.location.endswith(r"a\xff.txt:1")


def test_a_separator_is_for_text_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.separator"):
        list(read_rows(write(tmp_path, "a.csv", "a\n1\n"), "||"))
