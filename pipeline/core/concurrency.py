"""Work beside the main thread, and pauses between attempts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")


@contextmanager
def in_background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work(stop)` in a thread during the block. At the end of the block `stop` is set and the thread is joined.

    The thread is a daemon: should the interpreter be torn down before the block ends, it keeps nobody waiting.
    """
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def side_by_side(checks: Sequence[Callable[[], Result]], deadline_s: float) -> list[Result | None]:
    """Run slow checks at the same time; None for each that is not done by the deadline.

    Name resolution has no time-out, hence daemon threads: one that hangs must not keep the process alive.
    """
    results: list[Result | None] = [None] * len(checks)

    def store(index: int, check: Callable[[], Result]) -> None:
        results[index] = check()

    threads = [threading.Thread(target=store, args=pair, daemon=True) for pair in enumerate(checks)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return list(results)


def backoff_s(first_s: float, longest_s: float) -> Iterator[float]:
    """Seconds to wait before each new attempt, without end: doubled each time up to `longest_s`."""
    pause_s = first_s
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, longest_s)
