"""Metrics on their way to MLflow while a stage works: in a thread of their own, so that an absent store delays nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pipeline.core.errors import cause_line
from pipeline.core.journal import Record
from pipeline.tracking.runs import Tracking
from pipeline.tracking.server import absence, pauses

_PAUSE_S = 0.5


class Delivery:
    """One run's series of metrics. Takes records at any time and sends them when the store is there.

    What is left at the end lies in the journal that the records came from; `Tracking.deliver` then sends the rest.
    """

    def __init__(self, tracking: Tracking, run_id: str, series: str, say: Callable[[str], None]) -> None:
        self._tracking, self._run_id, self._series, self._say = tracking, run_id, series, say
        self._waiting: dict[int, Record] = {}
        self._lock = threading.Lock()
        self._last: int | None = None
        self._pauses: Iterator[float] | None = None

    def offer(self, records: Sequence[Record]) -> None:
        """Records to be sent; a step that a restart repeats is sent once."""
        with self._lock:
            self._waiting |= {record["step"]: record for record in records}

    def attempt(self) -> float:
        """Send what waits; returns after how many seconds to try again. Raises nothing."""
        with self._lock:
            records = list(self._waiting.values())
        if not records:
            return _PAUSE_S
        try:
            self._last = self._tracking.deliver(self._run_id, self._series, records, after=self._last, at_once=True)
        except Exception as error:  # whatever the store raises, the work goes on
            return self._failed(error)
        with self._lock:
            self._waiting = {step: record for step, record in self._waiting.items() if step > self._last}
        if self._pauses:
            self._say(f"MLflow at {self._tracking.where} takes metrics again; all so far are delivered")
            self._pauses = None
        return _PAUSE_S

    def _failed(self, error: Exception) -> float:
        # What was sent may have arrived though its answer did not: the store is asked before more is sent.
        self._last = None
        if self._pauses is None:
            self._pauses = pauses()
            why = absence(error)
            trouble = f"is away ({why})" if why else f"does not take metrics ({cause_line(error)})"
            self._say(f"MLflow at {self._tracking.where} {trouble}; the work goes on, metrics are kept for later")
        return next(self._pauses)


@contextmanager
def delivering(delivery: Delivery) -> Iterator[None]:
    """Within the block, send what is offered; one last attempt at its end."""
    stop = threading.Event()

    def work() -> None:
        pause = _PAUSE_S
        while not stop.wait(pause):
            pause = delivery.attempt()
        delivery.attempt()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
