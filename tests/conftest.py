import os

# Before numpy and torch are imported: test processes side by side, with several BLAS threads each, spin against each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import Any

import pytest

from tests.support.tiny_run import Bench, make_bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("end-to-end"))


@pytest.fixture(scope="session")
def first(bench: Bench) -> dict[str, Any]:
    """What an undisturbed run leaves."""
    return bench.run("workspace")
