"""The commands of the registry, `kasa models`, `kasa promote` and `kasa rollback`, and what they print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pipeline.cli.shared import JsonOption, ReasonOption, WorkspaceOption, out, plain_table, show, uncut

if TYPE_CHECKING:
    from pipeline.apps.models import Change, ModelRow

_DIGITS = 12  # of the data's digest


def models(
    name: Annotated[str | None, typer.Argument(help="A registered model; left out: all of them.")] = None,
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """List the registered versions: aliases, verdict, the metric it was given on, and where they come from."""
    from pipeline.apps.models import list_models

    rows = list_models(workspace, name)
    show(rows, as_json, _models_json, _show_models)


def promote(
    model: Annotated[str, typer.Argument(help="`models:/NAME/3` or `models:/NAME@challenger`.")],
    reason: ReasonOption = None,
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion by hand; the champion before it becomes the previous one."""
    from pipeline.apps.models import promote as promote_version

    changed = promote_version(workspace, model, reason)
    show(changed, as_json, _change_json, _show_change)


def rollback(
    name: Annotated[str, typer.Argument(help="The registered model.")],
    reason: ReasonOption = None,
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion the champion again; a second time leads back."""
    from pipeline.apps.models import rollback as roll_back

    changed = roll_back(workspace, name, reason)
    show(changed, as_json, _change_json, _show_change)


def _models_json(rows: Sequence[ModelRow]) -> list[dict[str, Any]]:
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


def _show_models(rows: Sequence[ModelRow]) -> None:
    """Print a line for each version."""
    if not rows:
        out.print("no model is registered yet; kasa run registers one")
        return
    table = plain_table("model", "version", "aliases", "verdict", "gate metric", "95% interval", "data", "when (UTC)")
    for row in rows:
        when = row.version.created
        table.add_row(
            escape(row.version.name),
            row.version.version,
            ", ".join(row.aliases) or "-",
            row.decision or "-",
            f"{row.metric} {row.value:.4f}" if row.value is not None else "-",
            _difference(row),
            row.version.tags.get("kasa.data_digest", "-")[:_DIGITS],
            when.strftime("%Y-%m-%d %H:%M") if when else "-",
        )
    out.print(uncut(table))


def _change_json(change: Change) -> dict[str, Any]:
    return dataclasses.asdict(change)


def _show_change(change: Change) -> None:
    """Print which version is the champion now, and how to undo it."""
    if not change.changed:
        out.print(f"{escape(change.name)}: version {change.champion} is the champion already")
        return
    before = f"; before it version {change.before}" if change.before else ""
    out.print(f"[green]{escape(change.name)}: version {change.champion} is the champion now[/]{before}")
    if change.previous:
        out.print(f"back again: kasa rollback {escape(change.name)}")


def _difference(row: ModelRow) -> str:
    return "-" if row.difference is None else escape(f"{row.difference.text()} against the {row.opponent}")
