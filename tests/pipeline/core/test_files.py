"""Files and folders that are the old ones or the new ones, and work beside the main thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from kasa.files import remove_folder, replacing
from pipeline.core.errors import cause_line, one_line
from pipeline.core.files import atomic_write, make_once
from pipeline.core.machine import backoff_s, in_background


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file.json"
    atomic_write(file, "old")
    with replacing(file) as new:
        new.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert names(file.parent) == ["file.json"]


def test_a_folder_is_replaced_with_all_that_it_held(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("first", "second"):
        with replacing(folder) as new:
            new.mkdir()
            (new / name).touch()
    assert names(folder) == ["second"]
    assert names(tmp_path) == ["folder"]
    remove_folder(folder)
    assert names(tmp_path) == []


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_fails_leaves_the_old_one_and_nothing_else(is_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "path"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as new:
            new.mkdir() if is_folder else new.touch()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["path"]


def test_who_holds_the_lock_clears_away_what_a_killed_writer_left(tmp_path: Path) -> None:
    left, other = tmp_path / ".path.1.2.partial", tmp_path / ".another.1.2.partial"
    left.mkdir()
    other.touch()
    with replacing(tmp_path / "path", exclusive=True) as new:
        assert not left.exists()
        new.touch()
    assert other.exists()


def test_of_several_one_makes_it(tmp_path: Path) -> None:
    made: list[str] = []
    together = threading.Barrier(4)

    def make(new: Path) -> None:
        made.append(new.name)
        new.write_text("made")

    def ask(_: int) -> str:
        together.wait()
        return make_once(tmp_path / "deep" / "path", make).read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["made"] * 4
    assert len(made) == 1


def test_work_in_the_background_ends_with_its_block() -> None:
    ended = threading.Event()

    def work(stop: threading.Event) -> None:
        stop.wait()
        ended.set()

    with pytest.raises(ValueError, match="no"), in_background(work):
        raise ValueError("no")
    assert ended.is_set()


def test_pauses_grow_and_then_stay() -> None:
    assert list(islice(backoff_s(0.5, 3), 5)) == [0.5, 1, 2, 3, 3]


def test_an_error_as_one_line() -> None:
    assert one_line(ValueError("one\n  two")) == "one two"
    assert one_line(ValueError("x" * 400)) == "x" * 300
    assert one_line(ValueError()) == "ValueError"
    assert cause_line(ValueError("one\ntwo\n")) == "ValueError: two"
