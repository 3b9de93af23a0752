"""Multiple choice is scored as lm-evaluation-harness scores it, here on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.evaluations import against_harness


def test_the_harness_finds_the_same(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {"question": f"count {n}?", "choices": [f"{n} done", "from", f"count {n} from {n * n}"], "answer": n % 3}
        for n in range(9)
    ]
    found = against_harness(base, rows, "Q: {prompt}\nA: ", tmp_path)
    assert found["samples"] == 9
    assert found["largest_difference"] < 1e-4
    assert found["ours"] == found["harness"]
