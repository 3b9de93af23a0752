"""How the checks take time: a call, a whole `kasa` command, a module in a process of its own, and tasks that take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.core import ROOT

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ONE_THREAD = dict.fromkeys(_THREADS, "1")

Seconds = Mapping[str, list[float]]


def seconds_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Call a function; return (seconds, its result)."""
    started = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - started, result


def kasa_command(*arguments: str) -> tuple[dict[str, Any], float]:
    """Run a `kasa` command with `--json` in the repository's root; what it says of its progress goes to stderr.

    Returns:
        Its JSON result, and its seconds from start to exit, Python's own start included.

    Raises:
        RuntimeError: The command failed; its message is on stderr.
    """
    command = [sys.executable, "-m", "pipeline.cli.main", *arguments, "--json"]
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": python_path}
    seconds, done = seconds_of(
        subprocess.run, command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"`kasa {' '.join(arguments)}` ended with exit code {done.returncode}; its message is above")
    return json.loads(done.stdout.splitlines()[-1]), seconds


def start_module(module: str, *arguments: Any, one_thread: bool) -> subprocess.Popen[str]:
    """Start `python -m MODULE ARGUMENTS`; BLAS libraries read their number of threads when they are loaded."""
    environment = {name: value for name, value in os.environ.items() if name not in _THREADS}
    environment |= ONE_THREAD if one_thread else {}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a process that `start_module` started; return the JSON object that it printed last.

    Raises:
        RuntimeError: It failed.
    """
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args!r} ended with exit code {process.returncode}; its message is above")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def take_turns(tasks: Mapping[str, Callable[[int], object]], turns: int) -> dict[str, list[float]]:
    """Time every task in every turn, so that a change in the machine's speed meets all alike.

    A first turn is not counted, and the order changes from turn to turn.

    Returns:
        The seconds of every task by its name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    for turn in range(turns + 1):
        for name in order:
            took, _ = seconds_of(tasks[name], turn)
            if turn:
                seconds[name].append(took)
        # Forwards and backwards in turn, each time from another one: no task always follows the same one.
        order = order[::-1] if turn % 2 else order[::-1][1:] + order[::-1][:1]
    return seconds


def times_as_fast(seconds: Seconds, name: str, other: str) -> float:
    """How many times as fast as `other` a task is: the median over the turns of the ratio within a turn."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds[name], seconds[other], strict=True))
