import os

# Before numpy and torch are imported: test processes side by side, with several BLAS threads each, spin against each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support import forking
from tests.support.tiny_run import Bench, make_bench

# What takes long comes first, so that both test processes end at the same time.
TIERS = ("cluster", "processes")
_running: list[pytest.Item] = []


def pytest_configure(config: pytest.Config) -> None:
    # The processes of pytest-xdist inherit it.
    if not hasattr(config, "workerinput") and hasattr(os, "pidfd_open"):
        folder = tempfile.mkdtemp(prefix="kasa-tests-")
        os.environ[forking.VARIABLE] = f"{os.getpid()}:{folder}/socket"
        os.environ["KASA_CACHE"] = f"{folder}/cache"  # not the user's own
    sys.addaudithook(_refuse_unmarked_processes)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and forking.VARIABLE in os.environ:
        shutil.rmtree(forking.socket_path().parent, ignore_errors=True)
        del os.environ[forking.VARIABLE]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "s3" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[int, bool]:
    """The tier of a test; in each the tests that would wait for the first run, made by those of its group, come later."""
    tier = next((n for n, name in enumerate(TIERS) if item.get_closest_marker(name)), len(TIERS))
    group = item.get_closest_marker("xdist_group")
    waits = "first" in getattr(item, "fixturenames", ()) and not (group and group.args[0] == "workspace")
    return tier, waits


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.remove(item)


def _refuse_unmarked_processes(event: str, arguments: Any) -> None:
    """Hold `make quick` to what it promises: a test that starts a Python process says so by a marker."""
    if event == "subprocess.Popen" and _running and sys.executable in (arguments[0], arguments[1][0]):
        is_marked = any(_running[-1].get_closest_marker(name) for name in TIERS)
        assert is_marked, f"{_running[-1].nodeid} starts a Python process: mark it with pytest.mark.processes"


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One for all test processes of the session."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "end-to-end"
    with FileLock(f"{folder}.lock"):
        return Bench(folder) if (folder / "recipe.yaml").exists() else make_bench(folder)


@pytest.fixture(scope="session")
def first(bench: Bench) -> dict[str, Any]:
    """What an undisturbed run leaves in `workspace`; it is made once, by a command that is no fork."""
    result = Path(f"{bench.folder}.first.json")
    with FileLock(f"{result}.lock"):
        if not result.exists():
            result.write_text(json.dumps(bench.finish(bench.start("workspace", is_cold=True))), encoding="utf-8")
    return dict(json.loads(result.read_text(encoding="utf-8")))
