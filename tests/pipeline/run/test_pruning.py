"""What pruning removes, and what it must never remove."""

import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.run.lineage import Stored, plan_pruning, prune, stored_artifacts, unneeded_artifacts
from pipeline.storage.artifacts import ArtifactStore, StageKey

NOW = datetime(2026, 1, 31, tzinfo=UTC)
OLD, RECENT = NOW - timedelta(days=60), NOW - timedelta(days=1)


def one(name: str, used: datetime, **inputs: str) -> Stored:
    stage, key = name.split("/")
    return Stored(stage, key, Path(name), OLD, used, {"inputs": inputs}, {})


CHAIN = [
    one("prepare/p", OLD, sources="digest"),
    one("spectra/s", OLD, base="digest", prepared="p"),
    one("train/t", OLD, prepared="p", spectra="s"),
    one("train/u", OLD, prepared="p", spectra="s"),
    one("evaluate/e", OLD, prepared="p", adapter="t"),
]


@pytest.mark.parametrize(
    ("recent", "protected", "gone"),
    [
        ([], set(), "prepare/p spectra/s train/t train/u evaluate/e"),
        (["evaluate/e"], set(), "train/u"),
        ([], {"train/t"}, "train/u evaluate/e"),
        ([], {"train/t", "train/absent"}, "train/u evaluate/e"),
        (["spectra/s"], set(), "train/t train/u evaluate/e"),
        (["train/t", "train/u", "evaluate/e"], set(), ""),
    ],
)
def test_inputs_of_what_is_needed_are_needed(recent, protected, gone) -> None:
    stored = [one(a.name, RECENT if a.name in recent else OLD, **a.ingredients["inputs"]) for a in CHAIN]
    since = NOW - timedelta(days=30)
    assert " ".join(a.name for a in unneeded_artifacts(stored, protected, since)) == gone


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Two artifacts and an interrupted one, none of them used for 40 days."""
    store = ArtifactStore(tmp_path)
    for seed in (0, 1):
        store.find_or_make(key(seed), lambda folder: {"bytes": (folder / "file").write_bytes(b"x" * 100)})
    partial = store.root / "train" / "interrupted.partial"
    partial.mkdir()
    (partial / "checkpoint").write_bytes(b"x" * 50)
    for path in tmp_path.rglob("*"):
        age(path, 40)
    return tmp_path


def key(seed: int) -> StageKey:
    return StageKey("train", {"inputs": {}, "settings": {"seed": seed}})


def age(path: Path, days: float) -> None:
    then = datetime.now().timestamp() - days * 86400
    os.utime(path, (then, then))


def test_removed_with_what_interrupted_runs_left(workspace) -> None:
    planned = plan_pruning(workspace, 30)
    assert [removal.folder.suffix for removal in planned] == ["", "", ".partial"]
    assert sum(removal.size for removal in planned) > 250
    assert prune(planned) == planned
    assert not [path for path in (workspace / "artifacts" / "train").iterdir() if path.is_dir()]
    assert stored_artifacts(ArtifactStore(workspace)) == []


def test_what_is_damaged_beyond_reading_is_removed_with_it(workspace) -> None:
    folder = ArtifactStore(workspace).find(key(1)).folder
    (folder / "manifest.json").write_text("{")
    age(folder / "manifest.json", 40)
    planned = plan_pruning(workspace, 30)
    assert {removal.key for removal in planned} == {key(0).key, key(1).key, "interrupted"}
    assert prune(planned) == planned
    assert not folder.exists()


def test_reuse_is_use(workspace) -> None:
    ArtifactStore(workspace).find_or_make(key(1), lambda folder: pytest.fail("made although it was there"))
    assert key(1).key not in {removal.key for removal in plan_pruning(workspace, 30)}


def test_work_in_progress_is_left_alone(workspace) -> None:
    planned = plan_pruning(workspace, 30)
    with FileLock(workspace / "artifacts" / "train" / "interrupted.lock"):
        gone = prune(planned)
    assert gone == planned[:2]
    (workspace / "artifacts" / "train" / "interrupted.partial" / "journal").touch()
    assert plan_pruning(workspace, 30) == []


def test_half_removed_is_removed_next_time(workspace) -> None:
    folder = ArtifactStore(workspace).find(key(0)).folder
    shutil.move(folder, folder.with_name(f"{folder.name}.old"))
    planned = plan_pruning(workspace, 30)
    assert [removal.folder.suffix for removal in planned] == ["", ".old", ".partial"]
    prune(planned)
    assert not list(workspace.rglob("*.old"))


def test_what_a_run_at_work_has_found_or_made_is_kept(workspace) -> None:
    running = ArtifactStore(workspace)
    running.find_or_make(key(0), lambda folder: pytest.fail("made although it was there"))
    running.find_or_make(key(2), lambda folder: {})
    planned = plan_pruning(workspace, 0)
    assert len(planned) == 4
    assert [removal.key for removal in prune(planned)] == [key(1).key, "interrupted"]
    del running  # as at the end of its process
    assert {removal.key for removal in prune(plan_pruning(workspace, 0))} == {key(0).key, key(2).key}
