"""The tags that say where a run comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.core.code import code_tags
from pipeline.tracking.runs import Tracking


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@invalid"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A module in the first commit of a repository."""
    file = tmp_path / "package" / "module.py"
    file.parent.mkdir()
    file.write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return file


def test_the_commit_and_whether_it_is_what_runs(module: Path, tmp_path: Path) -> None:
    commit = git(tmp_path, "rev-parse", "HEAD")
    clean = code_tags(module)
    assert clean["kasa.code.commit"] == clean["mlflow.source.git.commit"] == commit
    assert clean["kasa.code.dirty"] == "false"
    (tmp_path / "untracked").write_text("no code")
    assert code_tags(module)["kasa.code.dirty"] == "false"
    module.write_text("x = 2\n")
    assert code_tags(module)["kasa.code.dirty"] == "true"


def test_an_installed_copy_in_a_foreign_repository_has_no_commit(module: Path) -> None:
    copy = module.with_name("installed.py")
    copy.write_text("x = 1\n")
    assert set(code_tags(copy)) == {"kasa.code.digest"}


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text("x = 1\n")
    assert set(code_tags(tmp_path / "module.py")) == {"kasa.code.digest"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(code_tags()) == {"kasa.code.digest"}


def test_mlflow_takes_the_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = Tracking(tmp_path, "tried")
    run_id = tracking.start_run("run", code_tags())
    assert code_tags().items() <= tracking.client.get_run(run_id).data.tags.items()
