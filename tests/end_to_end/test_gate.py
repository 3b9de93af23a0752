"""The gate on real trainings: a worse, an equal and a better challenger."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checks.registry import gate_of, run_gate

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("end_to_end")]


def test_only_the_better_challenger_is_promoted(tmp_path: Path) -> None:
    found = run_gate(tmp_path / "gate")
    judged = gate_of(found)
    assert (judged.measured, judged.flaws) == (3, ()), found
    assert found["worse"]["reason"].startswith(("worse", "no clear gain"))
    assert found["better"]["reason"].startswith("better, by more than 0.05")
    assert found["better"]["uri"] == "models:/letters@champion"
