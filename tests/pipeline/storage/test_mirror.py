import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.storage.mirror import Mirror, Pass, discard_work, plan_pass
from pipeline.storage.objects import ObjectStore


@pytest.mark.parametrize(
    ("here", "there", "known", "expected"),
    [
        ({"a": "1"}, {}, {}, Pass((), ("a",), (), ())),
        ({}, {"a": "x"}, {}, Pass(("a",), (), (), ())),
        ({"a": "1"}, {"a": "x"}, {"a": ("1", "x")}, Pass((), (), (), ())),
        ({"a": "2"}, {"a": "x"}, {"a": ("1", "x")}, Pass((), ("a",), (), ())),
        ({"a": "1"}, {"a": "y"}, {"a": ("1", "x")}, Pass(("a",), (), (), ())),
        # Changed in both places: somebody else has taken the work over.
        ({"a": "2"}, {"a": "y"}, {"a": ("1", "x")}, Pass(("a",), (), (), ())),
        ({}, {"a": "x"}, {"a": ("1", "x")}, Pass((), (), (), ("a",))),
        ({"a": "1"}, {}, {"a": ("1", "x")}, Pass((), (), ("a",), ())),
        ({}, {}, {"a": ("1", "x")}, Pass((), (), (), ())),
        # JSON says that the rest is complete: it comes last, and goes first.
        ({"s/a.json": "1", "s/b": "1"}, {}, {}, Pass((), ("s/b", "s/a.json"), (), ())),
        (
            {},
            {"s/a.json": "x", "s/b": "x"},
            {"s/a.json": ("1", "x"), "s/b": ("1", "x")},
            Pass((), (), (), ("s/a.json", "s/b")),
        ),
    ],
)
def test_a_pass_by_what_changed_where(
    here: dict[str, str], there: dict[str, str], known: dict[str, tuple[str, str]], expected: Pass
) -> None:
    assert plan_pass(here, there, known) == expected


def put(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    time.sleep(0.01)
    return file


def files(folder: Path) -> dict[str, str]:
    found = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(folder)): file.read_text() for file in found}


def test_two_nodes_see_what_the_other_writes(store: ObjectStore, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours" / "w", tmp_path / "theirs" / "w"
    here, there = Mirror(store, "w", ours), Mirror(store, "w", theirs)
    put(ours, "checkpoints/step-1/tensors", "1")
    put(ours, "checkpoints/step-1/checkpoint.json", "{}")
    put(ours, ".half.new", "no")
    put(ours, "ray_train/state", "no")
    here.run_pass()
    there.run_pass()
    assert files(theirs) == {"checkpoints/step-1/tensors": "1", "checkpoints/step-1/checkpoint.json": "{}"}
    put(theirs, "journal.jsonl", "a\n")
    (theirs / "checkpoints/step-1/checkpoint.json").unlink()
    (theirs / "checkpoints/step-1/tensors").unlink()
    there.run_pass()
    here.run_pass()
    assert (ours / "journal.jsonl").read_text() == "a\n"
    assert not (ours / "checkpoints").exists()
    assert set(store.versions("w")) == {"journal.jsonl"}


def test_a_journal_from_elsewhere_grows_in_its_place(store: ObjectStore, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours" / "w", tmp_path / "theirs" / "w"
    here, there = Mirror(store, "w", ours), Mirror(store, "w", theirs)
    put(theirs, "journal.jsonl", "a\n")
    there.run_pass()
    here.run_pass()
    followed = (ours / "journal.jsonl").stat().st_ino
    put(theirs, "journal.jsonl", "a\nb\n")
    there.run_pass()
    here.run_pass()
    assert (ours / "journal.jsonl").read_text() == "a\nb\n"
    assert (ours / "journal.jsonl").stat().st_ino == followed


def test_a_killed_pass_loses_no_line(store: ObjectStore, tmp_path: Path) -> None:
    """The store has what was pushed, the folder's memory does not know, and the file has grown since."""
    ours = tmp_path / "w"
    put(ours, "journal.jsonl", "a\n")
    store.write("w/journal.jsonl", b"a\n")
    journal = put(ours, "journal.jsonl", "a\nb\n")
    followed = journal.stat().st_ino
    mirror = Mirror(store, "w", ours)
    mirror.run_pass()
    mirror.run_pass()
    assert journal.read_text() == "a\nb\n"
    assert journal.stat().st_ino == followed
    assert (store.read("w/journal.jsonl") or ())[0] == b"a\nb\n"


def test_a_machine_that_was_away_takes_over_what_another_did(store: ObjectStore, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours" / "w", tmp_path / "theirs" / "w"
    put(ours, "journal.jsonl", "1\n2\n")
    Mirror(store, "w", ours).run_pass()
    put(ours, "journal.jsonl", "1\n2\n3 as seen here\n")  # and then it died
    there = Mirror(store, "w", theirs)
    there.run_pass()
    put(theirs, "journal.jsonl", "1\n2\n3 again\n4\n")
    there.run_pass()
    Mirror(store, "w", ours).run_pass()
    assert (ours / "journal.jsonl").read_text() == "1\n2\n3 again\n4\n"


def test_a_copy_that_was_deleted_is_fetched_again(store: ObjectStore, tmp_path: Path) -> None:
    mirror = Mirror(store, "w", tmp_path / "w")
    put(tmp_path / "w", "journal.jsonl", "1\n")
    mirror.run_pass()
    shutil.rmtree(tmp_path / "w")
    mirror.run_pass()
    assert (tmp_path / "w" / "journal.jsonl").read_text() == "1\n"


def test_work_that_was_discarded_does_not_come_back(store: ObjectStore, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    for name in ("journal.jsonl", "checkpoints/step-1/tensors", "ray_train/state"):
        put(folder, name, "1\n")
    mirror = Mirror(store, "w", folder)
    mirror.run_pass()
    discard_work(folder)
    mirror.run_pass()
    assert (files(folder), store.versions("w")) == ({}, {})


def test_two_threads_take_turns(store: ObjectStore, tmp_path: Path) -> None:
    mirror = Mirror(store, "w", tmp_path / "w")
    with ThreadPoolExecutor(4) as pool:
        for round_ in range(5):
            put(tmp_path / "w", "journal.jsonl", "line\n" * round_)
            list(pool.map(lambda _: mirror.run_pass(), range(4)))
            assert (tmp_path / "w" / "journal.jsonl").read_text() == "line\n" * round_


def test_who_was_cut_off_writes_nothing_more(store: ObjectStore, tmp_path: Path) -> None:
    put(tmp_path / "w", "a", "1")
    Mirror(store, "w", tmp_path / "w", lambda: True).run_pass()
    assert store.versions("w") == {}


def test_within_the_block_work_is_in_the_store_soon(store: ObjectStore, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with Mirror(store, "w", folder).running():
        put(folder, "a", "1")
        deadline = time.monotonic() + 30
        while "a" not in store.versions("w"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        put(folder, "b", "2")
    assert set(store.versions("w")) == {"a", "b"}

    def fail() -> None:
        with Mirror(store, "w", folder).running():
            put(folder, "c", "3")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "c" in store.versions("w")
