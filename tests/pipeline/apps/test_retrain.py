"""When there is something to do: what is new in words, what is read of unchanged files, and what a record is worth."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kasa.files import sealed_json
from pipeline.apps.retrain import Finished, Inputs, look, read_finished, what_is_new
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.core.files import SETTLED_S, read_digests
from pipeline.run import graph as keys

BEFORE = Inputs("d", "b", "r", "c")


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (BEFORE, ""),
        (replace(BEFORE, data="x"), "new: the data"),
        (replace(BEFORE, base="x"), "new: the base"),
        (replace(BEFORE, recipe="x", code="y"), "new: the recipe, the code"),
    ],
)
def test_what_is_new_is_said_in_words(now: Inputs, said: str) -> None:
    assert what_is_new(BEFORE, now) == said
    assert what_is_new(None, now) == "there is no finished retraining yet"


@pytest.fixture
def nightly(tmp_path: Path) -> Recipe:
    """A recipe over a folder of rows and a base, all files written long ago."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "rows" / "monday.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    values = {
        "name": "nightly",
        "workspace": str(tmp_path / "workspace"),
        "base": {"model": str(tmp_path / "base")},
        "data": {"train": str(tmp_path / "rows")},
    }
    return parse_recipe(values, "recipe.yaml")


def _changed(before: Inputs, after: Inputs) -> set[str]:
    return {name for name in vars(before) if vars(before)[name] != vars(after)[name]}


def test_a_look_sees_a_new_file_a_changed_byte_and_another_setting(nightly: Recipe, tmp_path: Path) -> None:
    before = look(nightly)
    assert look(nightly) == before
    (tmp_path / "rows" / "tuesday.jsonl").write_text('{"prompt": "c", "completion": "d"}\n')
    more = look(nightly)
    assert _changed(before, more) == {"data"}
    (tmp_path / "base" / "model.safetensors").write_bytes(b"Weights")
    assert _changed(more, look(nightly)) == {"base"}
    other = nightly.model_copy(update={"train": nightly.train.model_copy(update={"seed": 1})})
    assert _changed(look(nightly), look(other)) == {"recipe"}


def test_a_change_of_code_or_versions_is_new(nightly: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = look(nightly)
    monkeypatch.setattr(keys, "package_versions", lambda packages: dict.fromkeys(packages, "another"))
    assert _changed(before, look(nightly)) == {"code"}


def _aged(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time pass: ctime cannot be set back."""
    now = time.time()
    monkeypatch.setattr("pipeline.core.files.time.time", lambda: now + 2 * SETTLED_S)


def test_a_file_that_has_settled_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"12345")
    _aged(file, monkeypatch)
    for read in (5, 0, 0):
        cache = read_digests(tmp_path / "digests.json")
        digest = cache.digest(file)
        cache.save()
        assert cache.read_bytes == read
    # Same size, and the time of the change set back: the inode's own time tells.
    times = file.stat()
    while file.stat().st_ctime_ns == times.st_ctime_ns:  # the clock of a file system ticks in milliseconds
        file.write_bytes(b"54321")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = read_digests(tmp_path / "digests.json")
    assert again.digest(file) != digest
    assert again.read_bytes == 5


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"12345")
    for _ in range(2):
        cache = read_digests(tmp_path / "digests.json")
        cache.digest(file)
        cache.save()
        assert cache.read_bytes == 5


def test_a_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_text("[1")
    assert read_digests(tmp_path / "digests.json").known == {}


def test_a_damaged_record_is_named_and_counts_for_nothing(nightly: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_finished(nightly) is None
    file = nightly.workspace / "retrain" / "nightly.json"
    file.parent.mkdir(parents=True)
    finished = Finished("today", BEFORE, "r" * 32, "models:/m/1", True, "better")
    file.write_text(sealed_json(asdict(finished)))
    assert read_finished(nightly) == finished
    for damaged in (file.read_text().replace("models:/m/1", "models:/m/2"), '{"at": "today"}', "[1]", ""):
        file.write_text(damaged)
        assert read_finished(nightly) is None
        assert "nightly.json" in capsys.readouterr().err.replace("\n", "")
