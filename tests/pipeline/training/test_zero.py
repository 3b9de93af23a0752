"""Real DeepSpeed at every ZeRO stage, on one process and on two, against a plain torch loop."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.ranks import start_ranks

# Each number of processes is trained once, not once in every test process.
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("zero")]
# Stage 3 both with every parameter partitioned and with the small ones kept whole on every rank.
FP32 = ["0 fp32", "1 fp32", "2 fp32", "2 fp32 packed", "3 fp32", "3 fp32 packed", "3 fp32 persistent"]
BF16 = ["1 bf16", "2 bf16", "3 bf16"]
# A new head with a learning rate of its own; stage 1 works as stage 2.
HEAD_FP32 = ["0 fp32 head", "2 fp32 head", "3 fp32 head"]
HEAD_BF16 = ["3 bf16 head"]
WORLDS = (1, 2)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} processes")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of a process group of that size found out about all stages."""
    world, folder = request.param, tmp_path_factory.mktemp("zero")
    start_ranks("tests.pipeline.training.zero_script", [str(folder / "result.json")], world, folder).wait()
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("case", FP32 + HEAD_FP32)
def test_the_losses_are_those_of_plain_torch(found: dict[str, Any], case: str) -> None:
    losses, plain = found[case]["losses"], found["plain head" if case in HEAD_FP32 else "plain"]
    assert len(losses) == len(plain) == 6
    assert losses == pytest.approx(plain, abs=1e-5)
    # Steps that change nothing would agree as well, if both did so.
    assert found[case]["moved"] == found[case]["parameters"]
    assert abs(plain[0] - plain[-1]) > 0.1


@pytest.mark.parametrize("case", FP32 + BF16 + HEAD_FP32 + HEAD_BF16)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(found: dict[str, Any], case: str) -> None:
    assert found[case]["restored_differs"] == []
    assert found[case]["resumed"] == found[case]["losses"][3:]
    assert found[case]["end_differs"] == []


def test_stage_3_really_partitions(found: dict[str, Any]) -> None:
    assert found["3 fp32"]["partitioned"]
    assert found["3 bf16"]["partitioned"]
