"""A comparison for people (rich) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from pipeline.apps.compare.paper import findings_json, table
from pipeline.apps.compare.run import Compared, Plan, TrialPlan

_out = Console(highlight=False, soft_wrap=True)
# Columns of the table on paper that say how a method did; here what it took has a table of its own, for narrow terminals.
_RESULTS = slice(3, 7)


def compared_json(compared: Compared) -> dict[str, Any]:
    """The comparison as one JSON object."""
    return {
        "name": compared.plan.name,
        "run_id": compared.run_id,
        "folder": str(compared.folder),
        "trials": compared.trials,
        "reused": compared.reused,
        **findings_json(compared.findings),
    }


def show_compared(compared: Compared) -> None:
    """Conclusion, table, what it does not say, and where the rest is."""
    found = compared.findings
    head, rows = table(found)
    lines = [head, *rows]
    _print_table([line[:1] + line[_RESULTS] for line in lines])
    _out.print()
    _print_table([line[: _RESULTS.start] + line[_RESULTS.stop :] for line in lines])
    _out.print(f"\n{escape(found.conclusion)}")
    for limit in found.limits:
        _out.print(f"- {escape(limit)}")
    _out.print(f"\n{compared.trials} trials, {compared.reused} of them finished before")
    _out.print(f"in full  {compared.folder / 'comparison.md'}")


def _print_table(lines: Sequence[Sequence[str]]) -> None:
    """The first line is the head. What is too wide goes on below: no digit is left out."""
    head, *rows = lines
    words = [max((len(word) for word in name.split()), default=0) for name in head]
    columns = [Column(name, overflow="fold", min_width=word) for name, word in zip(head, words, strict=True)]
    columns[0].no_wrap = True
    shown = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, header_style="bold")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    _out.print(shown)


def planned_json(plan: Plan, trials: Sequence[TrialPlan]) -> dict[str, Any]:
    """The trials as one JSON object."""
    return {"name": plan.name, "trials": [dataclasses.asdict(trial) for trial in trials]}


def show_planned(plan: Plan, trials: Sequence[TrialPlan]) -> None:
    """A line for each trial, with what is there of it."""
    _out.print(f"comparison {escape(plan.name)}, against {escape(plan.against)}")
    shown = Table("trial", "trains", "reuses", "makes", box=None, pad_edge=False, header_style="bold")
    for trial in trials:
        known = trial.reused or trial.made
        shown.add_row(
            escape(trial.name),
            "" if trial.parameters is None else f"{trial.parameters:,}",
            ", ".join(trial.reused),
            ", ".join(trial.made) or ("nothing" if known else "known once earlier trials and inputs are there"),
        )
    _out.print(shown)
