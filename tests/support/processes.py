"""A `kasa` command in a process of its own, and the processes beneath it: to be watched and killed."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from tests.support import ROOT
from tests.support.forking import forked_worker, start_python

Found = TypeVar("Found")

KASA = Path(__file__).parent / "bin" / "kasa"


def start_kasa(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, is_cold: bool = False
) -> subprocess.Popen[str]:
    """`kasa ARGUMENTS` in `folder`; its output can be read at the end.

    Of the surroundings' settings of Ray and MLflow it sees those in `environment` alone. In a test it is a fork of a
    process that has imported everything, unless `is_cold`.
    """
    surroundings = {
        k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_", "KASA_")) or k == "KASA_CACHE"
    }
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return start_python(
        [str(KASA), *arguments],
        {**surroundings, **fixed, **(environment or {})},
        is_cold,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], Found], process: subprocess.Popen[str], patience_s: float) -> Found:
    """What `condition` returns once that is true.

    Raises:
        RuntimeError: the process ended before; with the end of what it said.
        TimeoutError: it took longer than `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode}: {process.communicate()[1][-3000:]}")
        time.sleep(0.02)
    raise TimeoutError(f"nothing seen within {patience_s:g} s")


def beneath(process: subprocess.Popen[str], mark: str = "") -> list[psutil.Process]:
    """Living descendants with `mark` in their command line: `RayTrainWorker`, or `gcs_server`, which is Ray's head.

    A Ray worker that is a fork counts as a descendant of the launcher that the raylet started for it.
    """
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        number = forked_worker(child.pid)
        for one in (child.pid, number) if number else (child.pid,):
            try:
                living = psutil.Process(one)
                if living.status() != psutil.STATUS_ZOMBIE and any(mark in part for part in living.cmdline()):
                    found.append(living)
            except psutil.NoSuchProcess:
                continue
    return found


def end_all(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL to whatever of them is left."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
