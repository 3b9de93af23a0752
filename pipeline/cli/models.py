"""Registered models for people (rich) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.apps.models import Change, ModelRow

_out = Console(highlight=False, soft_wrap=True)
_DIGITS = 12


def models_json(rows: Sequence[ModelRow]) -> list[dict[str, Any]]:
    """The versions as JSON values, with all their tags."""
    return [
        {
            "name": row.version.name,
            "version": row.version.version,
            "uri": row.version.uri,
            "aliases": list(row.aliases),
            "decision": row.decision,
            "reason": row.reason,
            "metric": row.metric,
            "value": row.value,
            "against": row.opponent,
            "difference": dataclasses.asdict(row.difference) if row.difference else None,
            "data_digest": row.version.tags.get("kasa.data_digest", ""),
            "created": row.version.created.isoformat(timespec="seconds") if row.version.created else "",
            "history": row.history,
            "tags": {name: value for name, value in row.version.tags.items() if name.startswith("kasa.")},
        }
        for row in rows
    ]


def show_models(rows: Sequence[ModelRow]) -> None:
    """A line for each version."""
    if not rows:
        _out.print("no model is registered yet; kasa run registers one")
        return
    columns = ("model", "version", "aliases", "verdict", "gate metric", "95% interval", "data", "when (UTC)")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        when = row.version.created
        table.add_row(
            escape(row.version.name),
            row.version.version,
            ", ".join(row.aliases) or "-",
            row.decision or "-",
            f"{row.metric} {row.value:.4f}" if row.value is not None else "-",
            _interval(row),
            row.version.tags.get("kasa.data_digest", "-")[:_DIGITS],
            when.strftime("%Y-%m-%d %H:%M") if when else "-",
        )
    # What is to be copied must not be cut, however narrow the terminal.
    table.width = _out.measure(table, options=_out.options.update(width=1000)).maximum
    _out.print(table)


def change_json(change: Change) -> dict[str, Any]:
    """A change of aliases as one JSON object."""
    return dataclasses.asdict(change)


def show_change(change: Change) -> None:
    """Who is the champion now, and how to undo it."""
    if not change.changed:
        _out.print(f"{escape(change.name)}: version {change.champion} is the champion already")
        return
    before = f"; before it version {change.before}" if change.before else ""
    _out.print(f"[green]{escape(change.name)}: version {change.champion} is the champion now[/]{before}")
    if change.previous:
        _out.print(f"back again: kasa rollback {escape(change.name)}")


def _interval(row: ModelRow) -> str:
    if row.difference is None:
        return "-"
    return escape(f"{row.difference.text()} against the {row.opponent}")
