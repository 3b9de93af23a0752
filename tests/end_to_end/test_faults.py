"""Real runs with real faults: whatever dies or hangs, the run or the same command again ends with the same adapter."""

from __future__ import annotations

import resource
import signal
import socket
from typing import Any

import pytest

from pipeline.run.graph import STAGES
from tests.support.processes import beneath, end_all
from tests.support.tiny_run import Bench, adapter_bytes, assert_recorded_once, mid_training, parents

pytestmark = pytest.mark.cluster


@pytest.fixture
def name(request: pytest.FixtureRequest, bench: Bench, first: dict[str, Any]) -> str:
    """A workspace with all that training begins with: the faults come later."""
    name = "; ".join(request.node.name.split("_")[2:5])  # a folder's name may hold any character
    bench.copy_beginning(first["artifacts"], name)
    return name


def test_a_worker_killed_and_one_hung_change_nothing_in_the_result(
    bench: Bench, first: dict[str, Any], name: str
) -> None:
    process = bench.start(name, "train.collective_timeout_s=10")
    mid_training(bench, name, process)[1].send_signal(signal.SIGKILL)
    hung = mid_training(bench, name, process, 9)[1]
    hung.suspend()
    result, said = bench.finish_saying(process)
    assert "was killed" in said
    assert f"train: training worker 1 (process {hung.pid} on {socket.gethostname()}) hangs: the others" in said
    assert adapter_bytes(result, bench) == adapter_bytes(first, bench)
    assert_recorded_once(bench, name, result)


# Whether a step needs memory that it has not got depends on the allocator and on what the machine had free before.
@pytest.mark.soak
def test_a_worker_without_memory_says_what_to_do(bench: Bench, first: dict[str, Any], name: str) -> None:
    # Every tensor is asked of the system anew, not of what freed ones left: a step cannot do without it.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "8192", "MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1"}
    process = bench.start(name, environment=malloc)
    worker = mid_training(bench, name, process)[1]
    # Less than the process has already: whatever it asks for from now on, it does not get.
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (2**30, 2**30))
    result, said = bench.finish_saying(process)
    assert "train: training worker 1 ran out of memory; lower train.micro_batch_size" in said
    assert adapter_bytes(result, bench) == adapter_bytes(first, bench)


def test_a_killed_head_and_a_killed_driver_are_resumed_in_the_same_mlflow_runs(
    bench: Bench, first: dict[str, Any], name: str
) -> None:
    process = bench.start(name)
    mid_training(bench, name, process)
    ray_processes = beneath(process)
    try:
        (head,) = beneath(process, "gcs_server")
        head.kill()
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "failed: Ray's head process died; the same command resumes from here" in said.splitlines()

        process = bench.start(name)
        mid_training(bench, name, process, 9)
        ray_processes += beneath(process)
        process.kill()
        process.wait()
        (interrupted,) = parents(bench.mlflow(name))
        # Ray's own processes notice the driver's death by themselves; the next run must not depend on how fast.
        result = bench.run(name)
    finally:
        end_all(ray_processes)
    assert result["run_id"] == interrupted.info.run_id
    assert len(parents(bench.mlflow(name))) == 1
    assert_recorded_once(bench, name, result)
    assert result["stages"] == dict.fromkeys(STAGES, "computed") | {
        "prepare": "reused",
        "spectra": "reused",
        "audit": "reused",
    }
    assert adapter_bytes(result, bench) == adapter_bytes(first, bench)
