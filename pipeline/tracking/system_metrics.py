"""What the driver's machine is doing while a stage works: CPU, memory, and GPUs where there are any, as MLflow names them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.core.journal import Record, append_journal, read_journal

SERIES = "system/cpu_utilization_percentage"
# MLflow's own setting of the same meaning, and its default.
_INTERVAL_VARIABLE, _INTERVAL_S = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", 10.0
# The first sample comes early, so that a short training has one.
_FIRST_S = 1.0


@contextmanager
def sampling(journal: Path) -> Iterator[None]:
    """Within the block, append a sample to `journal` every ten seconds, or as MLflow's environment variable says.

    The steps go on from those that are there: a restart neither repeats nor overwrites one. MLflow's own monitor would
    end for good with the first call that finds the server away.
    """
    monitors = _monitors()
    stop = threading.Event()
    interval = _interval_s()
    first = max((record["step"] for record in read_journal(journal)), default=-1) + 1

    def work() -> None:
        step, pause = first, min(_FIRST_S, interval)
        while not stop.wait(pause):
            append_journal(journal, [_sample(monitors, step)])
            step, pause = step + 1, interval

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors: list[Any] = [CPUMonitor()]
    with suppress(ImportError, RuntimeError):  # no NVIDIA driver, so no such GPU
        monitors.append(GPUMonitor())
    _collect(monitors)  # psutil's first figure is that since the process began
    return monitors


def _sample(monitors: list[Any], step: int) -> Record:
    return {**_collect(monitors), "step": step, "time_s": time.time()}


def _collect(monitors: list[Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return values


def _interval_s() -> float:
    try:
        seconds = float(os.environ.get(_INTERVAL_VARIABLE, ""))
    except ValueError:
        return _INTERVAL_S
    return seconds if seconds > 0 else _INTERVAL_S
