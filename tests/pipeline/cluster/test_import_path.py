"""Where the workers of a run look for modules first."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cluster import connection
from tests.support import ROOT


@pytest.mark.parametrize(
    ("package_root", "first"),
    [(ROOT, [str(ROOT)]), (Path("/venv/lib/python3.11/site-packages"), [])],
    ids=["checkout", "installed"],
)
def test_never_in_the_folder_of_a_command(
    package_root: Path, first: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_ROOT", package_root)
    config = connection._job_config()
    config.set_runtime_env({"env_vars": {"OMP_NUM_THREADS": "1"}})
    # As Ray does it before it connects.
    config._py_driver_sys_path.extend([str(tmp_path), str(tmp_path / "script")])
    assert list(config._get_proto_job_config().py_driver_sys_path) == first
