"""The graph at work: which function is called when and with what, tried with a graph of its own."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kasa.errors import KasaError
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
        SimpleNamespace(recipe=recipe()), SimpleNamespace(check_unchanged=None), SimpleNamespace(), KeyInputs(recipe())
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


def test_what_was_made_while_its_inputs_changed_is_thrown_away(tmp_path: Path) -> None:
    """The digest of the inputs, and so the key, does not stand for the bytes that were read."""

    def check() -> None:
        raise KasaError("the base was changed")

    made = tmp_path / "made"
    store = SimpleNamespace(find_or_make=lambda key, make, recompute: make(made))
    recipe = SimpleNamespace(name="tiny")
    context: Any = SimpleNamespace(recomputed={}, store=store, check_inputs=check, recipe=recipe)

    def make(folder: Path) -> dict[str, Any]:
        (folder / "checkpoints").mkdir(parents=True)
        return {}

    stage = StageRun(context, "run", False)
    with pytest.raises(KasaError, match="the base was changed"):
        stage.artifact(StageKey("train", {}), make)
    assert not made.exists()
    context.check_inputs = lambda: None
    stage.artifact(StageKey("train", {}), make)
    assert made.exists()
