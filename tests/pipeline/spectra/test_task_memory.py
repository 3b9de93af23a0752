"""Memory that tasks reserve: how much a weight needs, and that Ray keeps to it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from kasa.targets import Target
from pipeline.config.recipe import Weighted
from pipeline.run.stages.spectra import decomposition_bytes
from tests.support import ROOT
from tests.support.forking import start_python
from tests.support.ray_head import plain_environment

SCRIPT = """
import sys
import torch
from kasa.spectra import bottom_triplets
from kasa.weighting import Weighting

height, width, weighted = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
weight = torch.randn(height, width)
covariances = [(lambda half: half @ half.T)(torch.randn(side, 256)) for side in (width, height)]
weighting = {"no": None, "inputs": Weighting(covariances[0]), "both": Weighting(*covariances)}[weighted]
bottom_triplets(weight, 16, "weight", weighting)
# Not ru_maxrss: that begins with what the process that started this one had.
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("height", "width", "weighted"),
    [(2048, 4096, "both"), (3072, 1536, "inputs")],
)
def test_a_decomposition_needs_what_it_reserves(height: int, width: int, weighted: Weighted) -> None:
    script = [sys.executable, "-c", SCRIPT, str(height), str(width), weighted]
    out = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    reserved = decomposition_bytes(Target("weight", height, width), 4, weighted)
    assert 0.6 * reserved < int(out) <= reserved


def test_a_70b_weight_needs_what_hardly_fits_beside_another() -> None:
    gib = decomposition_bytes(Target("down_proj", 8192, 28672), 2, "both") / 2**30
    assert 20 < gib < 30


TASKS = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.workers import Resources, run_tasks

folder = Path(sys.argv[1])

def meets(item):
    # Waits for the two others as long as it takes: whether they are there together is no matter of the machine's speed.
    (folder / f"{item}.here").touch()
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*.here"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(list(folder.glob("*.here")))

def busy(memory):
    started = time.time()
    time.sleep(0.5)
    return started, time.time()

with ray_cluster(folder, 4, 0):
    with ThreadPoolExecutor(1) as passing:  # Ray is started from a thread that is gone soon, and must not go with it
        passing.submit(run_tasks, busy, [0], Resources(cpus=0.1)).result()
    import ray
    node = int(ray.cluster_resources()["memory"])
    beside = run_tasks(meets, [0, 1, 2], Resources(cpus=0.1))  # starts the workers that the next ones find
    items = [node * 2 // 3, node * 2 // 3, node * 2]
    apart = run_tasks(busy, items, lambda memory: Resources(0.1, memory_bytes=memory))
print(json.dumps([beside, apart]))
"""


@pytest.mark.cluster
def test_tasks_that_need_a_nodes_memory_do_not_meet_on_it(tmp_path: Path) -> None:
    environment = {**plain_environment(), "PYTHONPATH": str(ROOT)}
    process = start_python(["-c", TASKS, str(tmp_path)], environment, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=1200)
    assert process.returncode == 0
    beside, apart = json.loads(out.splitlines()[-1])
    assert beside == [3, 3, 3]
    assert all(one[1] <= other[0] for one, other in pairwise(sorted(apart)))
