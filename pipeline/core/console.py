"""Progress bars and messages of a running command. They go to stderr, so that stdout holds results only."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from pipeline.core.redaction import redacted


class RedactingConsole(Console):
    """A console that prints no secrets, whoever wrote the text (`pipeline.core.redaction`)."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does. Tables are printed as they are: who fills one redacts its cells."""
        super().print(*(redacted(one) if isinstance(one, str) else one for one in objects), **options)


console = RedactingConsole(stderr=True, highlight=False)

# Without a terminal (CI, logs of a Ray job) a line at most this often replaces the bars.
PLAIN_INTERVAL_S = 15.0


class ProgressBars:
    """Progress of several activities at once. Its methods may be called from several threads.

    Attributes:
        reached: the newest progress of the whole process, such as `after step 12 of 60`; empty while there is none.
    """

    reached: ClassVar[str] = ""

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, int] = {}
        self._printed: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._label = ""

    @contextmanager
    def showing(self) -> Iterator[ProgressBars]:
        """Show the bars during the block."""
        if not console.is_terminal:
            yield self
            return
        with self._bars:
            yield self

    @contextmanager
    def labelled(self, label: str) -> Iterator[ProgressBars]:
        """The same bars for one of several concurrent activities.

        Its lines start with `label: `. Its bars are removed at the end of the block.
        """
        inner = copy.copy(self)
        inner._label = f"{label}: "
        try:
            yield inner
        finally:
            for name in [name for name in list(self._tasks) if name.startswith(inner._label)]:
                self._bars.remove_task(self._tasks.pop(name))  # type: ignore[arg-type]

    def say(self, text: str) -> None:
        """Print a line that stays, above the bars."""
        console.print(f"{self._label}{text}", markup=False, soft_wrap=True)

    def update(self, name: str, done: int, total: int, note: str = "", unit: str = "") -> None:
        """Show that `done` of `total` units of the activity `name` are complete, with a short note at the end of the line.

        Args:
            unit: its name; where there is none, the note names it.
        """
        name = f"{self._label}{name}"
        where = self._label.removesuffix(": ") if unit else name
        how_far = f"after {unit} {done} of {total}" if unit else f"after {done} of {total} {note}".rstrip()
        ProgressBars.reached = f"in {where} {how_far}" if where else how_far
        if console.is_terminal:
            self._update_bar(name, done, total, note)
        else:
            self._print_line(name, done, total, note)

    def _update_bar(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, note=note)
        self._bars.update(self._tasks[name], completed=done, total=total, note=note)  # type: ignore[arg-type]

    def _print_line(self, name: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        self._began.setdefault(name, (now, done))
        if done < total and now - self._printed.get(name, 0.0) < PLAIN_INTERVAL_S:
            return
        if self._printed.get(name) == float("inf"):
            return
        self._printed[name] = float("inf") if done >= total else now
        left = time_left(now - self._began[name][0], done - self._began[name][1], total - done)
        console.print(f"{name}: {done}/{total} {', '.join(part for part in (note, left) if part)}".rstrip())


def time_left(seconds: float, done: int, to_do: int) -> str:
    """An estimate such as `about 3 min left`; empty if nothing is left or nothing is known yet.

    Args:
        seconds: How long the first `done` units took.
        to_do: How many units are left.
    """
    if done <= 0 or to_do <= 0:
        return ""
    left = seconds * to_do / done
    for unit, length in (("h", 3600), ("min", 60)):
        if left >= 1.5 * length:
            return f"about {left / length:.0f} {unit} left"
    return f"about {left:.0f} s left"
