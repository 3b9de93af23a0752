"""Ctrl-C and SIGTERM at any moment of a run: it ends within ten seconds, leaves no process, and the same command goes on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from pipeline.run.graph import STAGES
from tests.support.processes import beneath, end_all, wait_for
from tests.support.tiny_run import (
    PATIENCE_S,
    Bench,
    adapter_bytes,
    assert_recorded_once,
    make_bench,
    mid_training,
    parents,
    runs_under,
)

pytestmark = pytest.mark.cluster

LONGEST_STOP_S = 10.0
SIGNALS, YOUNG_KILLS, PAIRS = 20, 20, 20
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def stop(process: subprocess.Popen[str], signum: signal.Signals) -> str:
    """Stop a command as a user or scheduler does; what it said on stderr."""
    left = beneath(process)
    began = time.monotonic()
    process.send_signal(signum)
    try:
        _, said = process.communicate(timeout=LONGEST_STOP_S)
        # Nobody waits for the last ones but init.
        _, alive = psutil.wait_procs(left, timeout=began + LONGEST_STOP_S - time.monotonic())
    finally:
        end_all(left)
        process.kill()
    assert not alive
    assert process.returncode == CODES[signum], said[-3000:]
    return said


def statuses(bench: Bench, workspace: str) -> dict[str, str]:
    """Of the run and of its stages."""
    client = bench.mlflow(workspace)
    (parent,) = parents(client)
    runs = [parent, *runs_under(client, parent.info.run_id)]
    return {run.info.run_name: run.info.status for run in runs}


def test_ctrl_c_while_training_and_sigterm_while_evaluating(bench: Bench, first: dict[str, Any]) -> None:
    bench.copy_beginning(first["artifacts"], "stopped")
    process = bench.start("stopped")
    mid_training(bench, "stopped", process)
    said = stop(process, signal.SIGINT)
    done = max(record["step"] for record in bench.journal("stopped") if "step" in record)
    place = said.splitlines()[-1].partition(" of 30; the same command goes on from there: ")
    assert place[0].rpartition(" ")[0] == "stopped after step"
    assert int(place[0].rpartition(" ")[2]) in range(1, done + 1)
    assert place[2].endswith("kasa run recipe.yaml workspace=stopped --json")
    assert statuses(bench, "stopped") == {"tiny": "KILLED", **dict.fromkeys(STAGES[:3], "FINISHED"), "train": "KILLED"}
    # Ray Train has been at work in this process, and would have left its handler of Ctrl-C behind.
    process = bench.start("stopped")
    wait_for(lambda: list((bench.folder / "stopped/artifacts/evaluate").glob("*.partial")), process, PATIENCE_S)
    stop(process, signal.SIGTERM)
    assert statuses(bench, "stopped") == {
        "tiny": "KILLED",
        **dict.fromkeys(STAGES[:4], "FINISHED"),
        "evaluate": "KILLED",
    }
    result = bench.run("stopped")
    assert adapter_bytes(result, bench) == adapter_bytes(first, bench)
    assert_recorded_once(bench, "stopped", result)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, dict[str, Any], float]:
    """A bench for many workspaces, with an undisturbed run and its seconds."""
    bench = make_bench(tmp_path_factory.mktemp("stopping"))
    began = time.monotonic()
    result = bench.finish(bench.start("undisturbed", is_cold=True))
    return bench, result, time.monotonic() - began


@pytest.fixture
def busy() -> Iterator[None]:
    """Two loops that take what the machine has."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.soak
@pytest.mark.usefixtures("busy")
def test_signals_at_random_moments(own: tuple[Bench, dict[str, Any], float]) -> None:
    bench, undisturbed, seconds = own
    moments = random.Random(0)
    workspace = "signals-0"
    for count in range(SIGNALS):
        process = bench.start(workspace, is_cold=True)
        # Python itself answers to the signals until it has read the command.
        if not ends_within(process, 3 + moments.uniform(0, seconds)):
            stop(process, (signal.SIGINT, signal.SIGTERM)[count % 2])
        else:  # a further run of a complete one would be another run in MLflow
            assert_complete(bench, workspace, bench.finish(process), undisturbed)
            workspace = f"signals-{count + 1}"
    assert_complete(bench, workspace, bench.run(workspace), undisturbed)


@pytest.mark.soak
def test_kills_within_the_first_seconds_of_a_workspace(own: tuple[Bench, dict[str, Any], float]) -> None:
    bench, undisturbed, _ = own
    moments = random.Random(1)
    for count in range(YOUNG_KILLS):
        workspace = f"young-{count}"
        process = bench.start(workspace, is_cold=True)
        assert not ends_within(process, moments.uniform(0.5, 10))
        left = beneath(process)
        process.kill()
        process.communicate()
        end_all(left)
        assert_complete(bench, workspace, bench.run(workspace), undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("begin", [lambda bench, made, workspace: None, Bench.copy_beginning], ids=["empty", "ready"])
def test_pairs_of_drivers_at_one_instant(
    own: tuple[Bench, dict[str, Any], float], begin: Callable[[Bench, Any, str], None], request: pytest.FixtureRequest
) -> None:
    bench, undisturbed, _ = own
    for count in range(PAIRS // 2):
        workspace = f"pair-{request.node.callspec.id}-{count}"
        begin(bench, undisturbed["artifacts"], workspace)
        both = [bench.start(workspace, is_cold=True) for _ in range(2)]
        results = [bench.finish(process) for process in both]
        for result in results:
            assert adapter_bytes(result, bench) == adapter_bytes(undisturbed, bench)
        client = bench.mlflow(workspace)
        found = {run.info.run_id for run in parents(client)}
        assert found == {result["run_id"] for result in results}
        for run_id in found:
            assert sorted(run.data.tags["kasa.stage"] for run in runs_under(client, run_id)) == sorted(STAGES)


def ends_within(process: subprocess.Popen[str], seconds: float) -> bool:
    """Wait so long; whether the command has ended in order before that."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()[1][-3000:]
    return True


def assert_complete(bench: Bench, workspace: str, result: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """The adapter is that of the undisturbed run, and one run in MLflow holds everything."""
    assert adapter_bytes(result, bench) == adapter_bytes(undisturbed, bench)
    assert len(parents(bench.mlflow(workspace))) == 1
    assert_recorded_once(bench, workspace, result)
