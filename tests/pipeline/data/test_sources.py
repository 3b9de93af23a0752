"""No file of a folder or a pattern is passed over in silence, and none is trained on that only describes the data."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError
from pipeline.data import sources
from pipeline.data.sources import resolve_sources

ROW = b'{"text": "x"}\n'


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are printed."""
    lines: list[str] = []
    monkeypatch.setattr(sources, "_say", lines.append)
    return lines


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(ROW) if name.endswith(".gz") else ROW)
    return folder


def read_from(entry: Path | str, tmp_path: Path) -> list[str]:
    found = resolve_sources(DataSettings(train=[str(entry)]), tmp_path / "workspace")
    assert found is not None
    return [file.path.name for file in found.train]


@pytest.mark.parametrize(
    ("names", "read", "passed"),
    [
        (["a.jsonl", "b.jsonl.gz"], ["a.jsonl", "b.jsonl.gz"], []),
        (["a.jsonl", "README.txt", "README.md", "LICENSE"], ["a.jsonl"], ["LICENSE", "README.md", "README.txt"]),
        (["a.parquet", "dataset_info.json", "state.json"], ["a.parquet"], ["dataset_info.json", "state.json"]),
        (["a.jsonl", "deep/license.txt", "deep/b.txt"], ["a.jsonl", "b.txt"], ["deep/license.txt"]),
        (["a.jsonl", ".cache/b.jsonl", ".gitattributes"], ["a.jsonl"], [".cache/b.jsonl"]),
        (["a.jsonl", "b.tsv", "c.arrow"], ["a.jsonl"], ["b.tsv", "c.arrow"]),
        (["a.jsonl", *(f"{n}.png" for n in range(7))], ["a.jsonl"], [*(f"{n}.png" for n in range(5)), "and 2 more"]),
        (["license_plates.txt"], ["license_plates.txt"], []),
    ],
)
def test_what_is_no_data_in_a_folder_is_named(
    tmp_path: Path, said: list[str], names: list[str], read: list[str], passed: list[str]
) -> None:
    assert read_from(fill(tmp_path / "data", names), tmp_path) == read
    assert len(said) == bool(passed)
    assert all(name in said[0] for name in passed)


def test_a_pattern_takes_no_descriptions_either(tmp_path: Path, said: list[str]) -> None:
    fill(tmp_path / "data", ["a.txt", "README.txt", "deep.txt/b.txt"])
    assert read_from(tmp_path / "data" / "*.txt", tmp_path) == ["a.txt"]
    assert "README.txt" in said[0]
    assert "deep.txt" in said[0]


def test_a_folder_that_is_a_link_is_named(tmp_path: Path, said: list[str]) -> None:
    fill(tmp_path / "data", ["a.jsonl"])
    (tmp_path / "data" / "linked").symlink_to(fill(tmp_path / "other", ["b.jsonl"]))
    assert read_from(tmp_path / "data", tmp_path) == ["a.jsonl"]
    assert "linked" in said[0]


@pytest.mark.parametrize("name", ["b.jsonl.zst", "b.csv.bz2", "b.txt.zip", "b.parquet.gz"])
def test_data_that_cannot_be_unpacked_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} cannot be read as it is packed"):
        read_from(fill(tmp_path / "data", ["a.jsonl", name]), tmp_path)


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, pattern: str) -> None:
    fill(tmp_path / "data", ["a.jsonl"])
    (tmp_path / "data" / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is a link that leads nowhere"):
        read_from(tmp_path / "data" / pattern, tmp_path)


def test_a_folder_that_cannot_be_looked_into_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "data", ["a.jsonl", "deep/b.jsonl"])
    scandir = sources.os.scandir

    def scan(place: str) -> object:
        if str(place).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr("os.scandir", scan)
    with pytest.raises(DataError, match="deep cannot be read: Permission denied"):
        read_from(tmp_path / "data", tmp_path)
