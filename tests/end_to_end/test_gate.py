"""The gate before `@champion` on real trainings: a worse, an equal and a better challenger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import run_kasa
from tests.support.letters import write_task

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("end_to_end")]

STEPS, MORE_STEPS = 100, 400


def test_only_the_better_challenger_is_promoted(tmp_path: Path) -> None:
    write_task(tmp_path, "letters", STEPS)

    def verdict(*changes: str) -> dict[str, Any]:
        return run_kasa(tmp_path, "run", "recipe.yaml", *changes)["model"]

    assert verdict()["promoted"], "the first version does not beat the base"
    worse, equal, better = (
        verdict(change) for change in ("data.train=shuffled.jsonl", "train.seed=1", f"train.max_steps={MORE_STEPS}")
    )
    assert [one["promoted"] for one in (worse, equal, better)] == [False, False, True], (worse, equal, better)
    assert all("champion" in one["reason"] for one in (worse, equal, better))
    assert worse["reason"].startswith(("worse", "no clear gain"))
    assert better["reason"].startswith("better, by more than 0.05")
    assert better["uri"] == "models:/letters@champion"
