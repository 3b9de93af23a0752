"""`kasa artifacts`: what the stages left, why it was made, and the removal of what nothing needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kasa.errors import nearest
from pipeline.artifacts.store import ArtifactStore, StageKey
from pipeline.cli.shared import JsonOption, WorkspaceOption
from pipeline.core.errors import WorkspaceError
from pipeline.run.lineage import Stored, ingredients_by_name, stored_artifacts, why_made

app = typer.Typer(no_args_is_help=True, help="List, explain and prune what the stages made.")
_out = Console(highlight=False, soft_wrap=True)


@app.command("list")
def list_(workspace: WorkspaceOption = Path("workspace"), as_json: JsonOption = False) -> None:
    """Every artifact of the workspace: when it was made and last used, its size, and what it was made from."""
    stored = stored_artifacts(_store(workspace))
    if as_json:
        print(json.dumps([_values(one) for one in stored]))
        return
    table = Table("artifact", "made", "used", "size", "made from", box=None, pad_edge=False, header_style="bold")
    for one in stored:
        made_from = " ".join(one.inputs)
        table.add_row(one.name, f"{one.made:%Y-%m-%d %H:%M}", f"{one.used:%Y-%m-%d %H:%M}", _mib(one.size), made_from)
    _out.print(table)
    _out.print(f"{len(stored)} artifacts, {_mib(sum(one.size for one in stored))}, under {workspace / 'artifacts'}")


@app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="STAGE/KEY", help="As `list` shows it; the key may be cut short.")],
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """Why an artifact was made although there were others of its stage, and what it was made from."""
    stored = stored_artifacts(_store(workspace))
    one = _named(name, stored, workspace)
    earlier = [other for other in stored if other.made <= one.made]
    reasons = why_made(StageKey(one.stage, dict(one.ingredients)), ingredients_by_name(earlier))
    if as_json:
        print(json.dumps(_values(one) | {"reasons": reasons, "ingredients": one.ingredients}))
        return
    _out.print(
        f"{one.name}  made {one.made:%Y-%m-%d %H:%M} UTC, {_mib(one.size)}, MLflow run {one.facts['mlflow_run_id']}"
    )
    _out.print(f"made from  {' '.join(one.inputs) or 'the data and the base alone'}")
    _out.print(f"made for   {'; '.join(reasons) or 'the first time: there was no other of its stage'}", markup=False)


@app.command()
def prune(
    workspace: WorkspaceOption = Path("workspace"),
    unused_days: Annotated[float, typer.Option(min=0, help="Keep what was used within so many days.")] = 30,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what has not been used for long and what interrupted runs left, but nothing that a model with an alias needs."""
    from pipeline.run import pruning

    _store(workspace)
    planned = pruning.plan_pruning(workspace, unused_days)
    gone = pruning.prune(planned) if yes else planned
    names, size = [one.name for one in gone], sum(one.size for one in gone)
    if as_json:
        print(json.dumps({"removed": yes, "artifacts": names, "bytes": size}))
        return
    for name in names:
        _out.print(name)
    verb = "removed" if yes else "would go; --yes removes them"
    _out.print(f"{len(names)} of the workspace's artifacts, {_mib(size)}: {verb}" if names else "nothing to remove")


def _store(workspace: Path) -> ArtifactStore:
    if not (workspace / "artifacts").is_dir():
        raise WorkspaceError(f"{workspace} holds no artifacts; name the workspace of the runs with --workspace")
    return ArtifactStore(workspace)


def _named(name: str, stored: list[Stored], workspace: Path) -> Stored:
    found = [one for one in stored if one.name.startswith(name) and "/" in name]
    if len(found) == 1:
        return found[0]
    if found:
        raise WorkspaceError(f"{name} is the beginning of {len(found)} artifacts in {workspace}; give more of the key")
    hint = nearest(name, [one.name for one in stored]) or "; `kasa artifacts list` shows what there is"
    raise WorkspaceError(f"there is no artifact {name} in {workspace}{hint}")


def _values(one: Stored) -> dict[str, Any]:
    return {
        "artifact": one.name,
        "made": one.made.isoformat(),
        "used": one.used.isoformat(timespec="seconds"),
        "bytes": one.size,
        "folder": str(one.folder),
        "made_from": list(one.inputs),
        "mlflow_run_id": one.facts["mlflow_run_id"],
    }


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
