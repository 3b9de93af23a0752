"""The command that a stopped one is followed by."""

from __future__ import annotations

import pytest

from pipeline.cli.main import command_line


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["run", "my recipe.yaml", "workspace=w s;x"], "kasa run 'my recipe.yaml' 'workspace=w s;x'"),
        (["run", "r.yaml", "data.max_tokens=64"], "kasa run r.yaml data.max_tokens=64"),
        (["run", "r.yaml", "data.train=https://host/rows.jsonl"], "kasa run r.yaml data.train=https://host/rows.jsonl"),
        (["run", "r.yaml", "data.train=https://host/rows.jsonl?sig=abc"], ""),
        (["run", "r.yaml", "data.train=https://alice:pw@host/rows.jsonl"], ""),
        (["submit", "r.yaml", "--env", "HF_TOKEN=abc"], ""),
    ],
)
def test_it_can_be_typed_again_and_holds_no_secret(
    arguments: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/somewhere/{name}")
    assert command_line(["/somewhere/kasa", *arguments]) == shown
    assert command_line(["/checkout/pipeline/cli/main.py", *arguments]) == shown
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert command_line([".venv/bin/kasa", *arguments]) == shown.replace("kasa run", ".venv/bin/kasa run")
