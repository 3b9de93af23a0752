"""The graph at work: which function is called when and with what, tried with a graph of its own."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kasa.errors import KasaError
from pipeline.models.base import BaseModel
from pipeline.run import graph
from pipeline.run import stage_runs as work
from pipeline.run.dependencies import Dependencies, KeyInputs, Stage
from pipeline.run.stage_runs import StageRun, Work, run_stages
from pipeline.storage.artifacts import Artifact, StageKey


class Finding:
    """A result with an artifact in it."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch):
    """`stages(name=needed, ...)` puts a graph of such stages in the place of the real one; returns the calls made."""

    def build(**needed: tuple[str, ...] | None) -> list[tuple[str, dict[str, Any]]]:
        calls: list[tuple[str, dict[str, Any]]] = []

        def depends(names: tuple[str, ...] | None) -> Any:
            return lambda inputs: None if names is None else Dependencies({}, [], [], stages=names)

        def function(name: str) -> Any:
            def make(given: Work, key: StageKey, **inputs: Any) -> Any:
                calls.append((name, inputs))
                artifact = Artifact(name, key.key, Path(name), {}, reused=False)
                return Finding(artifact) if name == "found" else artifact

            return make

        for name in needed:
            module = ModuleType(f"pipeline.run.stages.{name}")
            setattr(module, name, function(name))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        made = tuple(
            Stage(name, f"{name}_made", depends(names), lambda recipe: (1, 0)) for name, names in needed.items()
        )
        for place in (graph, work):
            monkeypatch.setattr(place, "STAGE", {stage.name: stage for stage in made})
        monkeypatch.setattr(graph, "GRAPH", made)
        monkeypatch.setattr(graph, "code_digests", lambda entries, alone: {})
        return calls

    return build


def a_run(recipe) -> Work:
    return Work(
        SimpleNamespace(recipe=recipe()),
        SimpleNamespace(check_unchanged=None, as_found={}),
        SimpleNamespace(),
        KeyInputs(recipe()),
    )  # type: ignore[arg-type]


def test_a_stage_is_handed_what_it_needs_by_the_names_of_the_artifacts(stages, recipe) -> None:
    calls = stages(data=(), left_out=None, found=("data",), last=("found", "data"))
    given = a_run(recipe)
    results = run_stages(given)
    assert [name for name, _ in calls] == ["data", "found", "last"] == list(results) == list(given.made)
    # The whole of what a stage found, and what is kept of it.
    assert calls[-1] == ("last", {"found_made": results["found"], "data_made": results["data"]})
    assert given.made["found"] is results["found"].artifact
    assert {name: artifact.key for name, artifact in given.made.items()} == {
        name: key.key for name, key in graph.stage_keys(given.inputs).items()
    }


def test_stages_that_do_not_need_each_other_are_run_at_the_same_time(stages, recipe) -> None:
    stages(data=(), weights=(), both=("data", "weights"))
    meeting = threading.Barrier(2, timeout=20)

    def meet(given: Work, key: StageKey) -> Artifact:
        meeting.wait()  # which neither passes alone
        return Artifact(key.stage, key.key, Path(key.stage), {}, reused=False)

    for name in ("data", "weights"):
        setattr(sys.modules[f"pipeline.run.stages.{name}"], name, meet)
    assert list(run_stages(a_run(recipe))) == ["data", "weights", "both"]


def test_an_error_ends_the_run_when_what_was_running_is_over(stages, recipe) -> None:
    calls = stages(data=(), weights=(), both=("data", "weights"))

    def fail(given: Work, key: StageKey) -> Artifact:
        raise ValueError("no data")

    sys.modules["pipeline.run.stages.data"].data = fail  # type: ignore[attr-defined]
    given = a_run(recipe)
    with pytest.raises(ValueError, match="no data"):
        run_stages(given)
    assert [name for name, _ in calls] == ["weights"]


def a_stage(folder: Path) -> tuple[StageRun, list[str]]:
    """A stage whose artifact is made in the folder, and what it says."""
    folder.mkdir()
    store = SimpleNamespace(find_or_make=lambda key, make, recompute: make(folder))
    said: list[str] = []
    context: Any = SimpleNamespace(
        recomputed={}, store=store, check_inputs=lambda: None, recipe=SimpleNamespace(name="tiny"), inputs={},
        bars=SimpleNamespace(say=said.append),
    )  # fmt: skip
    return StageRun(context, "run", False), said


KEY = StageKey("train", {})


def test_what_was_made_while_its_inputs_changed_is_thrown_away(tmp_path: Path) -> None:
    """The digest of the inputs, and so the key, does not stand for the bytes that were read."""

    def check() -> None:
        raise KasaError("the base was changed")

    def make(folder: Path) -> dict[str, Any]:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "journal.jsonl").touch()
        return {}

    stage, _ = a_stage(tmp_path / "made")
    stage.context.check_inputs = check
    with pytest.raises(KasaError, match="the base was changed"):
        stage.artifact(KEY, make)
    assert not list((tmp_path / "made").iterdir())
    stage.context.check_inputs = lambda: None
    stage.artifact(KEY, make)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["checkpoints", "journal.jsonl"]


def killed(folder: Path) -> dict[str, Any]:
    (folder / "checkpoints").mkdir()
    raise KeyboardInterrupt


def swapped(base: Path) -> None:
    """Other weights lie there for a while."""
    kept = base.rename(base.with_name("kept"))
    base.write_bytes(b"others")
    base.unlink()
    kept.rename(base)


def rewritten(base: Path) -> None:
    base.write_bytes(base.read_bytes())


@pytest.mark.parametrize("change", [swapped, rewritten, lambda base: None], ids=["swapped", "rewritten", "left"])
def test_unfinished_work_goes_on_with_the_very_files_it_was_begun_with(tmp_path: Path, change: Any) -> None:
    """A checkpoint may be of other weights, which lay there until the process was killed: the key tells nothing of it."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    stage, said = a_stage(tmp_path / "made")
    stage.context.inputs = BaseModel("base", base).as_found
    with pytest.raises(KeyboardInterrupt):
        stage.artifact(KEY, killed)
    change(base / "model.safetensors")
    goes_on = []

    def make(folder: Path) -> dict[str, Any]:
        goes_on.append((folder / "checkpoints").exists())
        return {}

    stage.context.inputs = BaseModel("base", base).as_found
    stage.artifact(KEY, make)
    is_same = change not in (swapped, rewritten)
    assert goes_on == [is_same]
    assert len(said) == (not is_same)
    for line in said:
        assert line.startswith("train: begins anew, for files of ")
        assert str(base) in line


def test_files_at_another_place_are_not_compared(tmp_path: Path) -> None:
    stage, said = a_stage(tmp_path / "made")
    stage.context.inputs = {"place": "here:/base", "states": {"config.json": [1, 2, 3, 4]}}
    with pytest.raises(KeyboardInterrupt):
        stage.artifact(KEY, killed)
    stage.context.inputs = {"place": "there:/base", "states": {"config.json": [5, 2, 3, 4]}}
    stage.artifact(KEY, lambda folder: {"kept": (folder / "checkpoints").exists()})
    assert ((tmp_path / "made" / "checkpoints").exists(), said) == (True, [])
    # What says nothing that can be read is no proof.
    (tmp_path / "made" / ".inputs.json").write_text("{")
    stage.artifact(KEY, lambda folder: {})
    assert ((tmp_path / "made" / "checkpoints").exists(), len(said)) == (False, 1)
