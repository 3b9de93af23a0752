"""Two Ray nodes on this machine, one of which is taken away in the middle of training."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.processes import wait_for
from tests.support.tiny_run import PATIENCE_S, Bench

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.xdist_group("faults")]

LONG = ("train.epochs=10", "train.max_steps=220", "train.checkpoint_every=100", "train.min_workers=1")
NOTICE_S = 4


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> dict[str, Any]:
    return bench.run("undisturbed", *LONG)


@pytest.mark.parametrize("notice", [True, False])
def test_training_goes_on_without_the_node(
    bench: Bench, undisturbed: dict[str, Any], cluster: Any, notice: bool
) -> None:
    second, workspace = cluster.add_node(num_cpus=1), f"notice-{notice}"
    process = bench.start(workspace, *LONG, environment={"RAY_ADDRESS": cluster.address} | POLLING)
    wait_for(lambda: len(bench.journal(workspace)) > 5, process, PATIENCE_S)
    if notice:
        announce(cluster.address, second.node_id)
        time.sleep(NOTICE_S)
    cluster.remove_node(second, allow_graceful=False)
    result, said = bench.finish_saying(process)
    assert ("a node is about to be taken away; the state after step" in said) == notice
    assert ("failure 1; 3 are survived" in said) != notice

    ours, theirs = (
        load_file(bench.folder / one["artifacts"]["train"] / "adapter" / "tensors.safetensors")
        for one in (result, undisturbed)
    )
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5


# How often Ray's workers ask whether their node is to go; five seconds otherwise.
POLLING = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}


def announce(address: str, node: str) -> None:
    """What a cloud does before it takes a machine back."""
    ray = Path(sys.executable).with_name("ray")
    command = ["drain-node", "--address", address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "taken back", "--deadline-remaining-seconds", str(NOTICE_S)]
    subprocess.run([ray, *command], check=True, capture_output=True)
