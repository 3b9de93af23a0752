"""An artifact exists if and only if its manifest does; interrupted work is gone on with; nothing is made twice."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from kasa.files import remove_folder
from pipeline.core.errors import WorkspaceError
from pipeline.core.files import content_digest
from pipeline.storage.artifacts import ArtifactStore, StageKey
from pipeline.storage.objects import ObjectStore
from pipeline.storage.workspace import Workspace

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


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a byte": lambda folder: flip(folder / "deep" / "data"),
    "cut off": lambda folder: (folder / "deep" / "data").write_text("ma"),
    "a file gone": lambda folder: (folder / "deep" / "data").unlink(),
    "a fact": lambda folder: replace_text(folder / "manifest.json", '"rows": 3}', '"rows": 4}'),
    "an ingredient": lambda folder: replace_text(folder / "manifest.json", '"b": 1', '"b": 2'),
    "no JSON": lambda folder: (folder / "manifest.json").write_bytes(b"\xff{"),
    "empty": lambda folder: (folder / "manifest.json").write_text(""),
    "no object": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "no digests": lambda folder: (folder / "manifest.json").write_text('{"facts": {"rows": 3}}'),
}


def replace_text(file: Path, old: str, new: str) -> None:
    text = "".join(file.read_text().split("\n"))
    assert "".join(old.split()) in "".join(text.split())
    file.write_text("".join(text.split()).replace("".join(old.split()), "".join(new.split())))


def make_deep(folder: Path) -> dict:
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "data").write_text("made")
    return {"rows": 3}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_named_and_made_again(store, damage, capsys) -> None:
    folder = store.find_or_make(KEY, make_deep).folder
    damage(folder)
    with pytest.raises(WorkspaceError, match=f"{KEY.key}.*run the same command again"):
        store.check(folder)
    assert store.reuse(KEY) is None
    said = "".join(capsys.readouterr().err.split())
    assert "data" in said or "manifest.json" in said
    again = store.find_or_make(KEY, make_deep)
    assert (again.reused, again.facts) == (False, {"rows": 3})
    assert (folder / "deep" / "data").read_text() == "made"
    assert store.reuse(KEY) == replace(again, reused=True)


def test_what_is_damaged_is_replaced_under_its_lock(store) -> None:
    damaged = store.find_or_make(KEY, make_deep).folder
    flip(damaged / "deep" / "data")
    made = store.find_or_make(KEY, make_deep)
    assert not made.reused
    store.check(made.folder)


def test_of_a_part_only_that_part_is_looked_at(store) -> None:
    def make(folder: Path) -> dict:
        (folder / "other").write_text("made")
        return make_deep(folder)

    folder = store.find_or_make(KEY, make).folder
    flip(folder / "other")
    store.check(folder / "deep")
    store.check(folder / "deep" / "data")
    for path in (folder, folder / "other"):
        with pytest.raises(WorkspaceError, match=r"other was changed"):
            store.check(path)


def test_files_that_were_added_later_do_no_harm(store) -> None:
    folder = store.find_or_make(KEY, make_deep).folder
    (folder / "cache-1.arrow").write_text("of a reader")
    assert store.find_or_make(KEY, never).reused


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


def test_where_a_store_has_the_artifact_a_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    storage = Workspace(tmp_path, ObjectStore(f"memory://{uuid4().hex}", retry_s=5), "node")
    store = ArtifactStore(tmp_path, storage)
    folder = store.find_or_make(KEY, make_deep).folder
    flip(folder / "deep" / "data")
    assert store.find_or_make(KEY, never).reused
    assert (folder / "deep" / "data").read_text() == "made"
    flip(folder / "deep" / "data")
    storage.store.upload(folder / "deep" / "data", f"artifacts/{KEY.stage}/{KEY.key}/deep/data")
    assert not store.find_or_make(KEY, make_deep).reused
    remove_folder(folder)
    assert store.find_or_make(KEY, never).reused
