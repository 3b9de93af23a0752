"""`kasa artifacts` as a person types it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kasa.errors import KasaError
from pipeline.cli.main import app
from pipeline.core.errors import RecipeError, WorkspaceError
from pipeline.run.graph import stages_to_recompute
from pipeline.storage.artifacts import ArtifactStore, StageKey


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Two trainings that differ in the seed."""
    store = ArtifactStore(tmp_path)
    for seed in (0, 1):
        key = StageKey("train", {"inputs": {"prepared": "p"}, "settings": {"train": {"seed": seed}}})
        store.find_or_make(key, lambda folder: {"mlflow_run_id": "abc"})
    return tmp_path


def call(workspace: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["artifacts", *arguments, "--workspace", str(workspace)])
    if isinstance(result.exception, KasaError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_listed_and_explained(workspace) -> None:
    listed = json.loads(call(workspace, "list", "--json"))
    assert [one["made_from"] for one in listed] == [["prepare/p"]] * 2
    assert all(one["artifact"] in call(workspace, "list") for one in listed)
    reasons = {}
    for one in listed:
        explained = json.loads(call(workspace, "explain", one["artifact"][:12], "--json"))
        reasons[explained["ingredients"]["settings"]["train"]["seed"]] = explained["reasons"]
    assert reasons == {0: [], 1: ["train.seed 0 -> 1"]}


def test_names_are_not_cut(workspace, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    names = [one["artifact"] for one in json.loads(call(workspace, "list", "--json"))]
    for name in names:
        assert name in call(workspace, "list")
        assert name in call(workspace, "explain", name)


def test_recipes_have_reasons_of_their_own(tmp_path) -> None:
    store = ArtifactStore(tmp_path)
    for recipe, seed in (("one", 0), ("two", 1), ("one", 2)):
        key = StageKey("train", {"inputs": {"prepared": "p"}, "settings": {"train": {"seed": seed}}})
        store.find_or_make(key, lambda folder, recipe=recipe: {"mlflow_run_id": "abc", "recipe": recipe})
    found = [
        json.loads(call(tmp_path, "explain", one["artifact"], "--json"))
        for one in json.loads(call(tmp_path, "list", "--json"))
    ]
    reasons = {one["ingredients"]["settings"]["train"]["seed"]: one["reasons"] for one in found}
    assert reasons == {0: [], 1: [], 2: ["train.seed 0 -> 2"]}


def test_pruned_when_told_to(workspace) -> None:
    assert "would go" in call(workspace, "prune", "--unused-days", "0")
    assert len(json.loads(call(workspace, "list", "--json"))) == 2
    assert "removed" in call(workspace, "prune", "--unused-days", "0", "--yes")
    assert json.loads(call(workspace, "list", "--json")) == []
    assert "nothing to remove" in call(workspace, "prune")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "train/0000"], "there is no artifact train/0000"),
        (["explain", "train/"], "the beginning of 2 artifacts"),
    ],
)
def test_wrong_names(workspace, arguments, message) -> None:
    with pytest.raises(WorkspaceError, match=message):
        call(workspace, *arguments)


def test_a_workspace_without_artifacts(tmp_path) -> None:
    with pytest.raises(WorkspaceError, match="holds no artifacts"):
        call(tmp_path / "elsewhere", "list")


def test_stages_to_recompute() -> None:
    assert stages_to_recompute(["spectra"], "evaluate") == ["spectra", "evaluate", "register"]
    assert stages_to_recompute([], None) == []
    with pytest.raises(RecipeError, match=r"no stage 'trian'.*train"):
        stages_to_recompute(["trian"], None)
