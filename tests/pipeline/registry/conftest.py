"""A registry on a real MLflow database, and the commands on it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import mlflow
import pytest

from pipeline.cli.main import main
from pipeline.registry.store import Registry

Kasa = Callable[..., tuple[int, str, str]]


@contextmanager
def mlflow_forgets() -> Iterator[None]:
    """What MLflow remembers for the whole process is undone at the end."""
    with patch.dict(os.environ):
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        yield
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making one takes seconds."""
    folder = tmp_path_factory.mktemp("empty")
    with mlflow_forgets():
        Registry(folder)
    return folder / "mlflow.db"


@pytest.fixture
def registry(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """An empty registry in `work`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    shutil.copy(empty_database, tmp_path / "work")
    with mlflow_forgets():
        yield Registry(Path("work"))


@pytest.fixture
def kasa(registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kasa:
    """`kasa("models")` on the workspace `work`: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kasa", *arguments, "--workspace", "work"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return call
