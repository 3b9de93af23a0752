"""An artifact exists if and only if its manifest does; interrupted work is gone on with; nothing is made twice."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import WorkspaceError
from pipeline.core.files import content_digest
from pipeline.storage.artifacts import ArtifactStore, StageKey

KEY = StageKey("prepare", {"rows": 3, "nested": {"b": 1, "a": [1, 2]}})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def make_file(folder: Path) -> dict:
    (folder / "data").write_text("made")
    return {"rows": 3}


def never(folder: Path) -> dict:
    raise AssertionError("made although it was there")


def test_made_once_then_reused(store) -> None:
    assert store.find(KEY) is None
    made = store.find_or_make(KEY, make_file)
    again = store.find_or_make(KEY, never)
    assert (made.reused, again.reused) == (False, True)
    assert (again.facts, again.folder, again.key) == ({"rows": 3}, made.folder, KEY.key)
    assert (again.folder / "data").read_text() == "made"
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["ingredients"] == KEY.ingredients
    assert not list(made.folder.parent.glob("*.partial"))


def test_an_interrupted_make_leaves_its_work_to_the_next(store) -> None:
    def interrupted(folder: Path) -> dict:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.find_or_make(KEY, interrupted)
    assert store.find(KEY) is None

    def go_on(folder: Path) -> dict:
        assert (folder / "half").read_text() == "half"
        return {}

    assert not store.find_or_make(KEY, go_on).reused
    assert store.find(KEY) is not None


def test_killed_between_manifest_and_rename(store) -> None:
    partial = store.root / KEY.stage / f"{KEY.key}.partial"
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text('{"facts": {}')
    assert store.find(KEY) is None
    assert store.find_or_make(KEY, make_file).facts == {"rows": 3}


def test_a_folder_without_manifest_is_no_artifact(store) -> None:
    (store.root / KEY.stage / KEY.key).mkdir(parents=True)
    assert store.find(KEY) is None


@pytest.mark.parametrize("text", ["", "{", "{}", '{"stage": "prepare"}', "[1]", "null"])
def test_a_damaged_manifest_says_what_to_delete(store, text) -> None:
    artifact = store.find_or_make(KEY, make_file)
    (artifact.folder / "manifest.json").write_text(text)
    with pytest.raises(WorkspaceError, match=f"is damaged; delete .*{KEY.key} and run again"):
        store.find(KEY)


def test_removed_is_made_again(store) -> None:
    store.remove(store.find_or_make(KEY, make_file))
    assert not store.find_or_make(KEY, make_file).reused


def test_remade_when_asked_though_it_is_there(store) -> None:
    first = store.find_or_make(KEY, make_file)
    (first.folder / "extra").touch()
    assert not store.find_or_make(KEY, make_file, recompute=True).reused
    assert sorted(file.name for file in first.folder.iterdir()) == ["data", "manifest.json"]


def test_what_cannot_be_remade_stays(store) -> None:
    first = store.find_or_make(KEY, make_file)
    with pytest.raises(AssertionError):
        store.find_or_make(KEY, never, recompute=True)
    assert store.find(KEY) == replace(first, reused=True)


def test_two_at_once_make_it_once(store) -> None:
    makes, results = [], []

    def slow(folder: Path) -> dict:
        makes.append(folder)
        time.sleep(0.2)
        return {}

    threads = [threading.Thread(target=lambda: results.append(store.find_or_make(KEY, slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makes) == 1
    assert sorted(artifact.reused for artifact in results) == [False, True, True]


def test_keys_depend_on_content_not_order() -> None:
    assert KEY.key == StageKey("prepare", {"nested": {"a": [1, 2], "b": 1}, "rows": 3}).key
    assert KEY.key != StageKey("prepare", {"nested": {"a": [2, 1], "b": 1}, "rows": 3}).key
    assert len(KEY.key) == 16
    assert content_digest({"a": 1}) != content_digest({"a": "1"})
