"""What is made again after which change, and after which death: the real flow on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.core import Measurement, Setting, check
from pipeline.artifacts.store import ArtifactStore
from pipeline.run.graph import STAGES
from pipeline.run.lineage import stored_artifacts
from tests.support.processes import beneath, end_all, start_kasa, wait_for
from tests.support.tiny_inputs import write_tiny_inputs

PATIENCE_S = 600.0
EVERYTHING = frozenset(STAGES)
FROM_TRAIN = frozenset({"train", "evaluate", "register"})
# A rule that sees the weights alone, so that data and spectra are told apart, and spectra for more than one rank.
OVERRIDES = ("adapter.truncation=weight", "spectra.rank=8", "train.max_steps=4", "workspace=workspace")


@dataclass(frozen=True)
class Change:
    """A change, and the stages that depend on it.

    Attributes:
        overrides: of the recipe.
        file, edited: a file of which a byte is replaced, and the byte's place from its end.
        options: of the command.
    """

    name: str
    stages: frozenset[str]
    overrides: tuple[str, ...] = ()
    file: str | None = None
    place: int = 0
    options: tuple[str, ...] = field(default=())


CHANGES = (
    Change("nothing", frozenset()),
    Change("the learning rate", FROM_TRAIN, ("train.learning_rate=1e-3",)),
    Change("the rank, within that of the spectra", FROM_TRAIN | {"audit"}, ("adapter.rank=2",)),
    Change("how it is computed", frozenset(), ("train.workers=1", "train.micro_batch_size=4", "evaluate.workers=2")),
    Change("the longest sample", EVERYTHING - {"spectra"}, ("data.max_tokens=48",)),
    Change("what is generated", frozenset({"evaluate", "register"}), ("evaluate.max_new_tokens=2",)),
    Change("one byte of the data", EVERYTHING - {"spectra"}, file="rows.jsonl", place=10),
    Change("one byte of the base", EVERYTHING, file="base/model.safetensors", place=4),
    Change("nothing but one stage by force", frozenset({"audit"}), options=("--force", "audit")),
)


@check(bar=0, direction="at most", unit="stages made or reused against expectation")
def cache_precision(setting: Setting) -> Measurement:
    """Stages made again after nine changes of recipe, data, base and surroundings, tiny model, beyond those that depend on them."""
    folder = setting.scratch / "cache-precision"
    folder.mkdir()
    write_tiny_inputs(folder)
    made = {"the first run": sorted(_made(folder))}
    wrong = [] if set(made["the first run"]) == EVERYTHING else ["the first run"]
    for change in CHANGES:
        with _edited(folder, change):
            stages = _made(folder, *change.overrides, options=change.options)
        made[change.name] = sorted(stages)
        wrong += [f"{change.name}: {stage}" for stage in sorted(stages ^ change.stages)]
    return Measurement(len(wrong), {"made": made}, flaws=tuple(wrong))


@check(bar=0, direction="at most", unit="expectations not met")
def driver_kill(setting: Setting) -> Measurement:
    """Driver of a tiny run killed in each of the six stages: the run ends, nothing complete is made twice, one parent run."""
    folder = setting.scratch / "driver-kill"
    folder.mkdir()
    write_tiny_inputs(folder)
    store = ArtifactStore(folder / "workspace")
    complete: dict[str, str] = {}
    for stage in STAGES:
        _kill_in(folder, stage)
        complete |= _times_of_making(store)
    result = _finish(folder)
    wrong = [f"{name} was made twice" for name, made in complete.items() if _times_of_making(store).get(name) != made]
    missing = [stage for stage in STAGES[:-1] if not any(name.startswith(stage) for name in complete)]
    wrong += [f"{stage} was not complete before the next was killed" for stage in missing]
    parents = _parent_runs(folder)
    if parents != [result["run_id"]]:
        wrong.append(f"MLflow has the parent runs {parents}")
    return Measurement(
        len(wrong), {"complete_before_the_end": sorted(complete), "stages": result["stages"]}, flaws=tuple(wrong)
    )


def _made(folder: Path, *overrides: str, options: Sequence[str] = ()) -> set[str]:
    result = _finish(folder, *OVERRIDES, *overrides, *options)
    return {stage for stage, status in result["stages"].items() if status == "computed"}


@contextmanager
def _edited(folder: Path, change: Change) -> Iterator[None]:
    """Within the block the change's file differs in one byte; every file's times change in any case."""
    for file in (folder / "rows.jsonl", folder / "base" / "model.safetensors"):
        os.utime(file)
    if change.file is None:
        yield
        return
    file, kept = folder / change.file, folder / "kept"
    shutil.copy2(file, kept)
    content = bytearray(file.read_bytes())
    # A digit stays a digit, and a weight a finite number.
    content[-change.place] ^= 1
    file.write_bytes(content)
    try:
        yield
    finally:
        shutil.move(kept, file)


def _finish(folder: Path, *arguments: str) -> dict[str, Any]:
    process = start_kasa(["run", "recipe.yaml", *arguments, "--json"], folder)
    out, said = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        raise RuntimeError(f"`kasa run` ended with {process.returncode}: {said[-3000:]}")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def _kill_in(folder: Path, stage: str) -> None:
    """Start the run, and kill its driver as soon as the stage is at work."""
    process = start_kasa(["run", "recipe.yaml", "--json"], folder)
    work = folder / "workspace" / "artifacts" / stage
    wait_for(lambda: list(work.glob("*.partial")), process, PATIENCE_S)
    left = beneath(process)
    process.kill()
    process.communicate()
    end_all(left)


def _times_of_making(store: ArtifactStore) -> dict[str, str]:
    return {one.name: one.made.isoformat() for one in stored_artifacts(store)}


def _parent_runs(folder: Path) -> list[str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'workspace' / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    return [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
