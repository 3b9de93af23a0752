"""No secret on the terminal, in the file of a failure, or in what is stored of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.cli.shared import out, print_json
from pipeline.config.recipe import load_recipe, plain_values, recipe_values
from pipeline.core.console import console
from pipeline.core.errors import WorkspaceError
from pipeline.core.files import local_folder
from pipeline.run.context import _state_file

SECRET = '"https://alice:PW@host/rows.jsonl?token=PW" and 1'


@pytest.mark.parametrize("error", [WorkspaceError(f"{SECRET} is away"), RuntimeError(f"{SECRET} is away")])
def test_an_error_with_an_address(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit):
        main.main()
    said = "".join(capfd.readouterr())
    assert "https://host/rows.jsonl" in said
    assert "PW" not in said
    for file in tmp_path.iterdir():
        assert "PW" not in file.read_text()
        assert file.stat().st_mode & 0o077 == 0


def test_results(capsys: pytest.CaptureFixture[str]) -> None:
    out.print(f"from {SECRET}")
    console.print(f"from {SECRET}")
    print_json({"from": [SECRET]})
    said = capsys.readouterr()
    assert "PW" not in said.out + said.err
    assert json.loads(said.out.splitlines()[-1])["from"][0] == '"https://host/rows.jsonl?token=***" and 1'


def test_another_password_is_the_same_recipe(tmp_path: Path) -> None:
    def recipe(password: str):
        file = tmp_path / "recipe.yaml"
        file.write_text(f"name: tiny\ndata: {{train: 'https://me:{password}@host/rows.jsonl?sig={password}'}}\n")
        return load_recipe(file)

    old, new = recipe("PW-1"), recipe("PW-2")
    assert recipe_values(old) == recipe_values(new)
    assert plain_values(old) != plain_values(new)
    assert _state_file(tmp_path, old) == _state_file(tmp_path, new)
    assert local_folder("s3://key:PW-1@bucket/kasa") == local_folder("s3://key:PW-2@bucket/kasa")
