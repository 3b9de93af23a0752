"""A real adapter and its base answer questions of two turns; a judge on loopback decides."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.judge_server import judge_server
from tests.support.processes import start_kasa
from tests.support.tiny_run import PATIENCE_S, Bench

pytestmark = pytest.mark.cluster


def test_an_adapter_is_judged_against_its_base(bench: Bench, first: dict[str, Any]) -> None:
    rows = [{"question_id": n, "category": "counting", "turns": [f"count {n} from {n}", "again"]} for n in range(6)]
    (bench.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = f"{first['artifacts']['train']}/adapter"
    with judge_server() as server:
        command = [
            "judge", adapter, "questions.jsonl", "--endpoint", server.address, "--judge", "stand-in",
            "--max-new-tokens", "4", "--workers", "2", "--json",
        ]  # fmt: skip
        results = []
        for _ in range(2):
            process = start_kasa(command, bench.folder)
            out, said = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, said
            results.append(json.loads(out.splitlines()[-1]))
            asked = len(server.asked)
    result = results[0]
    assert (result["questions"], result["asked"], result["unreadable"]) == (6, 48, 0)
    assert set(result["grades"]) == {adapter, "base"}
    assert 0 <= result["win_rate"]["low"] <= result["win_rate"]["estimate"] <= result["win_rate"]["high"] <= 1
    answers = json.loads((bench.folder / result["folder"] / "answers.json").read_text())
    assert {len(turns) for model in answers.values() for turns in model.values()} == {2}
    assert results[1] == result
    assert asked <= 48  # equal questions about equal answers are asked once, and nothing at all by the second command
