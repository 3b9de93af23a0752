"""Watching a training: what its journals say is shown, and delivered to MLflow, while the workers run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.console import ProgressBars
from pipeline.core.journal import JournalTail, Record
from pipeline.run.context import RunContext
from pipeline.tracking.live_metrics import SYSTEM_SERIES, Delivery, delivering, sampling
from pipeline.training.job import INTERRUPTIONS, JOURNAL, NOTICES

# A metric of every step, and the journal of the machine's.
CURVE = "loss"
SYSTEM = "system.jsonl"
_POLL_S = 0.5
# A share of the time that is lost to waiting for data.
_WORTH_SAYING = 0.02


@contextmanager
def watching(context: RunContext, folder: Path, run_id: str) -> Iterator[None]:
    """Within the block, show what the journals say and pass it on to MLflow; neither waits for the other."""
    curve = Delivery(context.tracking, run_id, CURVE, context.bars.say)
    system = Delivery(context.tracking, run_id, SYSTEM_SERIES, lambda line: None)
    watcher = _Watcher(context.bars, folder, curve, system)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_S):
            watcher.look()
        watcher.look()

    thread = threading.Thread(target=watch, daemon=True)
    with delivering(curve), delivering(system), sampling(folder / SYSTEM):
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class _Watcher:
    """Follows the journals of a training."""

    def __init__(self, bars: ProgressBars, folder: Path, curve: Delivery, system: Delivery) -> None:
        self._bars, self._curve, self._system = bars, curve, system
        self._tail = JournalTail(folder / JOURNAL)
        self._system_tail = JournalTail(folder / SYSTEM)
        self._interruptions = [JournalTail(folder / name) for name in (NOTICES, INTERRUPTIONS)]
        self._new_interruptions()  # those of an earlier run of this command have been shown

    def look(self) -> None:
        """Show what is new, and hand it on to be delivered."""
        for record in self._new_interruptions():
            self._bars.say(f"train: {record['interruption']}")
        records = [record for record in self._tail.new_records() if "step" in record]
        if records:
            newest = records[-1]
            self._bars.update("train", newest["step"], newest["steps"], progress_note(records))
        self._curve.offer(records)
        self._system.offer(self._system_tail.new_records())

    def _new_interruptions(self) -> list[Record]:
        return [record for tail in self._interruptions for record in tail.new_records()]


def progress_note(records: Sequence[Record]) -> str:
    """The newest of a training's records in a few words."""
    newest = records[-1]
    looks = [f"validation {record['validation_loss']:.3f}" for record in records if "validation_loss" in record]
    waits = (
        [f"{newest['data_wait_share']:.0%} of the time for data"] if newest["data_wait_share"] > _WORTH_SAYING else []
    )
    numbers = [
        f"loss {newest['task_loss']:.3f}",
        *looks[-1:],
        f"{newest['tokens_per_second']:.0f} tokens/s",
        *waits,
        f"{newest['memory_gib']:.1f} GiB",
    ]
    return ", ".join(numbers)
