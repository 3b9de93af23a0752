"""Tasks that journal what they have done: whoever started them follows the journals while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.cluster.workers import Resources
from pipeline.core.console import ProgressBars
from pipeline.core.journal import JournalTail, Record

Item = TypeVar("Item")
Result = TypeVar("Result")

# Is handed what the journals have that it has not seen.
Follow = Callable[[Sequence[Record]], None]


class RunTasks(Protocol):
    """`pipeline.cluster.workers.run_tasks`, or what stands around it."""

    def __call__(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        resources: Resources | Callable[[Item], Resources],
        *,
        while_waiting: Callable[[], None],
    ) -> list[Result]: ...


def run_journalled_tasks(
    run_tasks: RunTasks,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    resources: Resources | Callable[[Item], Resources],
    journals: Iterable[Path],
    follow: Follow,
) -> list[Result]:
    """Run `function` once for each item on the cluster; results in order.

    Args:
        journals: the files that the tasks write to. What an earlier run of the command left in them is handed on first.
        follow: called about twice a second and once at the end, with the records that are new.
    """
    tails = [JournalTail(journal) for journal in journals]

    def look() -> None:
        follow([record for tail in tails for record in tail.new_records()])

    results = run_tasks(function, items, resources, while_waiting=look)
    look()
    return results


def counting(
    bars: ProgressBars, activity: str, total: int, unit: str, count: Callable[[Sequence[Any]], int] = len
) -> Follow:
    """Show how much of an activity is done, by what the records say.

    Args:
        total: how many `unit` there are in all.
        count: how many of them some records stand for.
    """
    done = 0

    def follow(records: Sequence[Record]) -> None:
        nonlocal done
        done += count(records)
        # Work that an interruption cut off is journalled twice.
        bars.update(activity, min(done, total), total, unit)

    return follow
