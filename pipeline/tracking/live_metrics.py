"""Metrics of a stage while it works: samples of the machine, and the delivery of both kinds to MLflow in the background.

Metrics go through journals. Whatever MLflow does not take during the stage is in the journal at its end, so an unavailable
store delays nobody and loses nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.core.errors import cause_line
from pipeline.core.files import Record, append_journal, read_journal
from pipeline.core.machine import backoff_s, in_background
from pipeline.tracking.availability import FIRST_PAUSE_S, LONGEST_PAUSE_S, unavailable_reason
from pipeline.tracking.runs import Tracking

# A metric that every sample of the machine has, under MLflow's name for it.
SYSTEM_SERIES = "system/cpu_utilization_percentage"

_PAUSE_S = 0.5
# MLflow's own setting of the same meaning, and its default.
_INTERVAL_VARIABLE, _INTERVAL_S = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", 10.0
# The first sample comes early, so that a short training has one.
_FIRST_SAMPLE_S = 1.0


class Delivery:
    """Sends the records of one series of metrics to one run, as soon as the store takes them.

    Records that are left at the end are still in the journal that they came from; `Tracking.deliver` sends them later.
    """

    def __init__(self, tracking: Tracking, run_id: str, series: str, say: Callable[[str], None]) -> None:
        self._tracking, self._run_id, self._series, self._say = tracking, run_id, series, say
        self._waiting: dict[int, Record] = {}
        self._lock = threading.Lock()
        self._last: int | None = None
        self._pauses: Iterator[float] | None = None

    def offer(self, records: Sequence[Record]) -> None:
        """Queue records for sending. A step that a restart repeats is sent once."""
        with self._lock:
            self._waiting |= {record["step"]: record for record in records}

    def attempt(self) -> float:
        """Send the queued records. Never raises. Returns after how many seconds to try again."""
        with self._lock:
            records = list(self._waiting.values())
        if not records:
            return _PAUSE_S
        try:
            self._last = self._tracking.deliver(self._run_id, self._series, records, after=self._last, retries=False)
        except Exception as error:  # whatever the store raises, the stage continues
            return self._failed(error)
        with self._lock:
            self._waiting = {step: record for step, record in self._waiting.items() if step > self._last}
        if self._pauses:
            self._say(f"MLflow at {self._tracking.where} takes metrics again; all so far are delivered")
            self._pauses = None
        return _PAUSE_S

    def _failed(self, error: Exception) -> float:
        # The records may have arrived although the reply was lost: the store is asked before more are sent.
        self._last = None
        if self._pauses is None:
            self._pauses = backoff_s(FIRST_PAUSE_S, LONGEST_PAUSE_S)
            why = unavailable_reason(error)
            trouble = f"is away ({why})" if why else f"does not take metrics ({cause_line(error)})"
            self._say(f"MLflow at {self._tracking.where} {trouble}; the work goes on, metrics are kept for later")
        return next(self._pauses)


def delivering(delivery: Delivery) -> AbstractContextManager[None]:
    """Send what is offered during the block, and make one last attempt at its end."""

    def work(stop: threading.Event) -> None:
        pause = _PAUSE_S
        while not stop.wait(pause):
            pause = delivery.attempt()
        delivery.attempt()

    return in_background(work)


@contextmanager
def sampling(journal: Path) -> Iterator[None]:
    """During the block append a sample of this machine to `journal` every ten seconds, or as MLflow's variable says.

    A sample holds the use of CPU and memory, and of GPUs if there are any, under MLflow's names. The steps
    continue those in the journal, so a restart neither repeats nor overwrites one. MLflow's own monitor would stop for
    good at the first call that finds the server unavailable.
    """
    monitors = _monitors()
    interval = _interval_s()
    first = max((record["step"] for record in read_journal(journal)), default=-1) + 1

    def work(stop: threading.Event) -> None:
        step, pause = first, min(_FIRST_SAMPLE_S, interval)
        while not stop.wait(pause):
            append_journal(journal, [_sample(monitors, step)])
            step, pause = step + 1, interval

    with in_background(work):
        yield


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors: list[Any] = [CPUMonitor()]
    with suppress(ImportError, RuntimeError):  # there is no NVIDIA driver, so no such GPU
        monitors.append(GPUMonitor())
    _collect(monitors)  # psutil's first figure covers the time since the process was started
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
