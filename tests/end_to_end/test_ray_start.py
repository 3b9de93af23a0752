"""A Ray of the run's own that does not come up at once, as happens on busy machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.processes import beneath, wait_for
from tests.support.ray_head import plain_environment

# Ray's patience for its own processes, 30 s, cannot be set: its clock may run faster than the machine's.
TASK = """
import sys
import time
import types
from pathlib import Path
import ray._private.node
from kasa import KasaError
from pipeline.cluster.connection import ray_cluster
from pipeline.cluster.workers import Resources, run_tasks

faster = int(sys.argv[2])
ray._private.node.time = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: faster * time.monotonic()})
try:
    with ray_cluster(Path(sys.argv[1]), 1, 0):
        print(run_tasks(lambda item: item + 1, [41], Resources()))
except KasaError as error:
    print(error)
"""


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("frozen", "faster", "said"),
    [
        pytest.param(1, 3, "[42]"),
        pytest.param(
            3,
            1,
            "Ray did not start on this machine in 3 attempts of 30 s each: it is too busy; end other programs, then the same "
            "command resumes from here",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_a_ray_that_does_not_come_up_is_started_anew(frozen: int, faster: int, said: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TASK, str(tmp_path), str(faster)],
        cwd=ROOT,
        # What the product sets before it imports Ray, which this test has imported already.
        env={**plain_environment(), "RAY_AUTH_MODE": "token"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    halted: list[int] = []
    for _ in range(frozen):
        raylet = wait_for(
            lambda: [one for one in beneath(process, "raylet/raylet") if one.pid not in halted], process, 120
        )[0]
        raylet.suspend()
        halted.append(raylet.pid)
    out, errors = process.communicate(timeout=240)
    assert out.strip() == said, errors
