"""The cache of a real run: what a change computes again, and what the death of the driver leaves to be reused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.run.graph import STAGES
from tests.support.commands import kill_with_descendants, run_kasa, times_of_completion
from tests.support.processes import wait_for
from tests.support.tiny_run import PATIENCE_S, Bench, make_bench, parents

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.xdist_group("end_to_end")]

EVERYTHING = frozenset(STAGES)
FROM_TRAIN = frozenset({"train", "evaluate", "register"})
# This truncation looks at the weights alone, so data and spectra are told apart; the spectra serve more than one rank.
OVERRIDES = ("adapter.truncation=weight", "spectra.rank=8", "train.max_steps=4", "workspace=workspace")


@dataclass(frozen=True)
class Change:
    """A change and the stages that depend on it.

    Attributes:
        arguments: Overrides of the recipe and options of the command.
        file: A file of which one byte is replaced.
        place: The place of that byte from the file's end.
    """

    name: str
    stages: frozenset[str]
    arguments: tuple[str, ...] = ()
    file: str = ""
    place: int = 0


CHANGES = (
    Change("nothing", frozenset()),
    Change("the learning rate", FROM_TRAIN, ("train.learning_rate=1e-3",)),
    Change("the rank, within that of the spectra", FROM_TRAIN | {"audit"}, ("adapter.rank=2",)),
    Change("how it is computed", frozenset(), ("train.workers=1", "train.micro_batch_size=4", "evaluate.workers=2")),
    Change("the longest sample", EVERYTHING - {"spectra"}, ("data.max_tokens=48",)),
    Change("what is generated", frozenset({"evaluate", "register"}), ("evaluate.max_new_tokens=2",)),
    Change("one byte of the data", EVERYTHING - {"spectra"}, file="rows.jsonl", place=10),
    Change("one byte of the base", EVERYTHING, file="base/model.safetensors", place=4),
    Change("nothing but one stage by force", frozenset({"audit"}), ("--force", "audit")),
)


@pytest.fixture(scope="module")
def computed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny inputs and a workspace in which every stage is complete."""
    folder = make_bench(tmp_path_factory.mktemp("caching")).folder
    assert computed(folder) == EVERYTHING
    return folder


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_a_change_computes_the_stages_that_depend_on_it_and_no_other(computed_once: Path, change: Change) -> None:
    with edited(computed_once, change):
        assert computed(computed_once, *change.arguments) == change.stages


def test_a_driver_killed_in_every_stage_in_turn_repeats_nothing_complete(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    complete: dict[str, str] = {}
    for stage in STAGES:
        kill_driver_in(bench, stage)
        complete |= times_of_completion(bench.folder / "workspace")
    result = bench.run("workspace")
    after = times_of_completion(bench.folder / "workspace")
    assert {name: after.get(name) for name in complete} == complete
    assert {name.partition("/")[0] for name in complete} >= set(STAGES[:-1])
    assert [run.info.run_id for run in parents(bench.mlflow("workspace"))] == [result["run_id"]]


def computed(folder: Path, *arguments: str) -> set[str]:
    """The stages that a run computed instead of reusing them."""
    result = run_kasa(folder, "run", "recipe.yaml", *OVERRIDES, *arguments)
    return {stage for stage, status in result["stages"].items() if status == "computed"}


@contextmanager
def edited(folder: Path, change: Change) -> Iterator[None]:
    """Within the block the change's file differs in one byte. The times of all input files change in any case."""
    for file in (folder / "rows.jsonl", folder / "base" / "model.safetensors"):
        os.utime(file)
    if not change.file:
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


def kill_driver_in(bench: Bench, stage: str) -> None:
    """Start the run and kill its driver as soon as the stage is at work."""
    process = bench.start("workspace")
    work = bench.folder / "workspace" / "artifacts" / stage
    wait_for(lambda: list(work.glob("*.partial")), process, PATIENCE_S)
    kill_with_descendants(process)
