"""What a person reads: errors in a line with exit code 2, names that can be copied, commands that work as printed."""

from __future__ import annotations

import errno
import gc
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import main as cli
from pipeline.cli import plan as plan_commands
from pipeline.core.errors import mendable

Kasa = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kasa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Kasa:
    """`kasa(...)` in a folder with a recipe: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "recipe.yaml").write_text("name: tiny\ndata: {train: rows.jsonl}\n")
    rows = (json.dumps({"prompt": f"{n}+2?", "completion": str(n + 2)}) + "\n" for n in range(20))
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "file").write_text("no folder")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kasa", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        gc.unfreeze()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "recipe.yaml", "train.lr=1"), "error: command line: unknown key train.lr (value 1); did you mean train.learning_rate?"),
        (("run", "recipe.yaml", "--workspace", ""), "error: command line: workspace: the text is empty"),
        (("run", "recipe.yaml", "--workspace", "file"), "the workspace file is a file; name a folder"),
        (("run", "recipe.yaml", "--workspace", "file/below"), "the workspace file/below cannot be written (Not a directory)"),
        (("run", "recipe.yaml", "register.model=team/tiny", "--dry-run"), "error: command line: register.model: a name consists of"),
        (("retrain", "recipe.yaml", "--workspace", "file"), "the workspace file cannot be written"),
        (("compare", "recipe.yaml", "--workspace", "", "--dry-run"), "error: command line: workspace: the text is empty"),
        (("plan", "recipe.yaml", "--workspace", ""), "error: command line: workspace: the text is empty"),
        (("plan", "recipe.yaml", "base.model=meta-llama/Meta-Llama-3-8B", "--utilisation", "nan"), "utilisation"),
        (("plan", "recipe.yaml", "base.model=meta-llama/Meta-Llama-3-8B", "--peak-tflops", "inf"), "peak-tflops"),
        (("models", "--workspace", "file"), "file holds no MLflow database"),
        (("models", "--workspace", "~/none"), "home/none holds no MLflow database"),
        (("artifacts", "list", "--workspace", "file"), "file holds no artifacts"),
        (("generate", "models:/tiny@champion", "workspace=w x"), "workspace holds no MLflow database"),
        (("artifacts", "prune", "--unused-days", "1e300", "--workspace", "file"), "unused-days"),
        (("generate", "models:/tiny@champion", "workspace=w"), "workspace=w is no prompt but a setting; write --workspace w"),
        (("generate", "models:/tiny@champion", "max_new_tokens=4"), "write --max-new-tokens 4"),
        (("generate", "~/adapter", "hello"), "~/adapter is neither a registry URI"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_that_names_it(kasa: Kasa, arguments: tuple[str, ...], says: str) -> None:
    code, _, text = kasa(*arguments)
    assert code == 2
    assert says in " ".join(text.split())
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/w/x"), "/w/x cannot be written: there is no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", b"/w/x"), "/w/x cannot be written: the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system", "/w/x"), "/w/x cannot be written: its file system is read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/w/x"), "/w/x may not be read or written by this user"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x"), "/proc/x does not exist"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/w/x"), "a part of this path is a file"),
        (FileExistsError(errno.EEXIST, "File exists", "/w"), "/w is there already, and is no folder"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "too long a name"),
        (sqlite3.OperationalError("database or disk is full"), "there is no space left"),
        (RuntimeError("cannot log"), None),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
        (ValueError("x"), None),
    ],
)
def test_what_the_system_refuses_is_told_apart(
    kasa: Kasa, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str | None
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(plan_commands, "catalogue", fails)
    code, _, text = kasa("recipes")
    assert code == (2 if says else 1)
    assert text.startswith(f"{'error' if says else 'failed'}: ")
    assert (says or str(error)) in text
    assert len(text.splitlines()) == (1 if says else 2)


def test_no_space_counts_whatever_wraps_it() -> None:
    full = RuntimeError("MLflow gave up")
    full.__cause__ = ValueError("x")
    full.__cause__.__context__ = OSError(errno.ENOSPC, "No space left on device", "/w/mlflow.db")
    assert "/w/mlflow.db cannot be written" in str(mendable(full))
    full.__cause__.__context__ = FileNotFoundError(errno.ENOENT, "No such file", "/w/x")
    assert mendable(full) is None
    full.__cause__.__context__ = full
    assert mendable(full) is None


def test_a_failure_is_told_even_where_its_traceback_cannot_be_written(kasa: Kasa, monkeypatch) -> None:
    monkeypatch.setattr(plan_commands, "catalogue", lambda: 1 / 0)
    monkeypatch.setattr(cli.tempfile, "NamedTemporaryFile", lambda *_, **__: os.mkdir("/proc/x"))
    code, _, text = kasa("recipes")
    assert (code, text.splitlines()[0]) == (1, "failed: ZeroDivisionError: division by zero")
    assert "cannot be written" in text


def test_the_version(kasa: Kasa) -> None:
    code, out, _ = kasa("--version")
    assert (code, out.split()[0]) == (0, "kasa")


def test_a_recipe_is_one_line_where_nobody_wraps_it(kasa: Kasa) -> None:
    _, out, _ = kasa("recipes")
    _, listed, _ = kasa("recipes", "--json")
    for one in json.loads(listed):
        assert any(one["name"] in line and one["summary"] in line for line in out.splitlines())


def test_a_workspace_is_an_option_and_a_setting(kasa: Kasa, tmp_path: Path) -> None:
    code, out, _ = kasa(
        "compare", "recipe.yaml", "--workspace", "~/kasa", "--dry-run", "--json", "base.model=openai-community/gpt2"
    )
    assert code == 0, out
    assert not (tmp_path / "~").exists()
