"""The database of a workspace: made whole or not at all, by one of several, and its files are where it is."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from pipeline.core.errors import WorkspaceError
from pipeline.tracking import server
from pipeline.tracking.runs import Tracking
from pipeline.tracking.server import connect, own_database, ready_database, registry_identity

pytestmark = pytest.mark.xdist_group("tracking")


@pytest.fixture(autouse=True)
def _forgets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What MLflow remembers for the whole process is undone at the end."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a database; making one takes seconds."""
    folder = tmp_path_factory.mktemp("empty")
    ready_database(folder)
    return folder


def test_a_death_while_it_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Path] = []

    def dies(new: Path) -> None:
        for name in (new, Path(f"{new}-journal")):
            name.write_bytes(b"half a migration")
            left.append(name.with_name(name.name.replace(".mlflow.db.", ".mlflow.db.1")))
            shutil.copy(name, left[-1])  # as a process leaves it that is killed
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_create_database", dies)
    with pytest.raises(KeyboardInterrupt):
        ready_database(tmp_path)
    assert not (tmp_path / "mlflow.db").exists()
    assert all(path.exists() for path in left)
    monkeypatch.setattr(
        server,
        "_create_database",
        lambda new: sqlite3.connect(new).execute("CREATE TABLE experiments (artifact_location)"),
    )
    ready_database(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_of_two_at_once_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, together = [], threading.Barrier(2)

    def make(new: Path) -> None:
        made.append(new)
        sqlite3.connect(new).execute("CREATE TABLE experiments (artifact_location)")

    def first_use() -> None:
        together.wait(20)
        ready_database(tmp_path)

    monkeypatch.setattr(server, "_create_database", make)
    threads = [threading.Thread(target=first_use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_an_experiment_made_by_another_in_the_same_moment_is_found(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty / "mlflow.db", tmp_path)
    first = Tracking(tmp_path, "tried")
    look = type(first.client._target).get_experiment_by_name
    looks: list[str] = []

    def too_early(client: mlflow.MlflowClient, name: str):
        looks.append(name)
        return None if len(looks) == 1 else look(client, name)

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", too_early)
    second = Tracking(tmp_path, "tried")
    assert first.start_run("a", {}) != second.start_run("b", {})
    assert first._experiment_id == second._experiment_id


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_workspace_that_was_moved_or_copied_has_its_files_with_it(empty: Path, tmp_path: Path, is_copy: bool) -> None:
    before, after = tmp_path / "be%fore", tmp_path / "aft er"
    before.mkdir()
    shutil.copy(empty / "mlflow.db", before)
    (tmp_path / "note").write_text("text")
    old = Tracking(before, "tried")
    run_id = old.start_run("a", {})
    old.log_files(run_id, tmp_path / "note")
    old.client.create_registered_model("m")
    uri = old.client.get_run(run_id).info.artifact_uri
    old.client.create_model_version("m", source=f"{uri}/note")
    (shutil.copytree if is_copy else shutil.move)(before, after)
    new = Tracking(after, "tried")
    place = (after.resolve() / "mlartifacts").as_uri()
    for found in (run_id, new.start_run("b", {})):
        assert new.client.get_run(found).info.artifact_uri.startswith(f"{place}/{found}/")
    assert new.client.get_model_version_download_uri("m", "1") == f"{place}/{run_id}/artifacts/note"
    assert [file.path for file in new.client.list_artifacts(run_id)] == ["note"]
    # What lies elsewhere stays there.
    assert new.client.get_experiment("0").artifact_location == old.client.get_experiment("0").artifact_location


@pytest.mark.parametrize("content", [b"no database", None])
def test_a_broken_database_is_named_with_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    if content:
        (tmp_path / "mlflow.db").write_bytes(content * 100)
    else:  # what a process left that was killed in a migration
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            database.execute("CREATE TABLE experiments (experiment_id INTEGER, artifact_location, workspace)")
            database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
    with pytest.raises(WorkspaceError, match=r"move .*mlflow\.db away") as said:
        connect(tmp_path)
    assert "busy" not in str(said.value)


def test_a_workspaces_own_registry_is_the_same_wherever_it_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    assert registry_identity(here) == registry_identity(there) == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own_database(here))
    assert (registry_identity(here), registry_identity(there)) == ("", own_database(here))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:PW@server:5000")
    assert registry_identity(here) == registry_identity(there) == "http://server:5000"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://registry:5000")
    assert registry_identity(here) == "http://registry:5000"
