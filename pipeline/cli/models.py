"""The commands for what runs leave: `kasa models`, `promote`, `rollback`, `generate`, `serve`, `export`, `import`, `artifacts`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from kasa.errors import nearest
from pipeline.cli import shared
from pipeline.cli.shared import (
    BaseOption,
    JsonOption,
    ReasonOption,
    WorkspaceOption,
    out,
    plain_table,
    print_json,
    show,
    size_text,
    uncut,
)
from pipeline.core.console import RedactingConsole
from pipeline.core.errors import ModelError, WorkspaceError
from pipeline.core.files import user_path
from pipeline.run.lineage import Stored, ingredients_by_name, of_recipe, stored_artifacts, why_made
from pipeline.storage.artifacts import ArtifactStore, StageKey

if TYPE_CHECKING:
    from pipeline.apps.models import Change, ModelRow
    from pipeline.serving.export import Exported

artifacts_app = typer.Typer(no_args_is_help=True, help="List, explain and prune what the stages made.")
_out = RedactingConsole(highlight=False, soft_wrap=True)

NewFolderArgument = Annotated[
    Path, typer.Argument(metavar="OUT", parser=user_path, help="A folder that does not exist yet.")
]
_DIGITS = 12  # of the data's digest


@artifacts_app.command("list")
def list_(workspace: WorkspaceOption = Path("workspace"), as_json: JsonOption = False) -> None:
    """Every artifact of the workspace: when it was made and last used, its size, and what it was made from."""
    stored = stored_artifacts(_store(workspace))
    if as_json:
        print_json([_values(one) for one in stored])
        return
    table = plain_table("artifact", "made", "used", "size", "made from")
    for one in stored:
        made_from = " ".join(one.inputs)
        table.add_row(one.name, f"{one.made:%Y-%m-%d %H:%M}", f"{one.used:%Y-%m-%d %H:%M}", _mib(one.size), made_from)
    _out.print(uncut(table))
    _out.print(f"{len(stored)} artifacts, {_mib(sum(one.size for one in stored))}, under {workspace / 'artifacts'}")


@artifacts_app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="STAGE/KEY", help="As `list` shows it; the key may be cut short.")],
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """Why an artifact was made although there were others of its stage, and what it was made from."""
    stored = stored_artifacts(_store(workspace))
    one = _named(name, stored, workspace)
    earlier = [other for other in stored if other.made <= one.made]
    own = of_recipe(earlier, one.facts["recipe"]) if "recipe" in one.facts else None
    reasons = why_made(StageKey(one.stage, dict(one.ingredients)), ingredients_by_name(earlier), own)
    if as_json:
        print_json(_values(one) | {"reasons": reasons, "ingredients": one.ingredients})
        return
    _out.print(
        f"{one.name}  made {one.made:%Y-%m-%d %H:%M} UTC, {_mib(one.size)}, MLflow run {one.facts['mlflow_run_id']}"
    )
    _out.print(f"made from  {' '.join(one.inputs) or 'the data and the base alone'}")
    _out.print(
        f"made for   {'; '.join(reasons) or 'the first time: there was no other of its stage and recipe'}", markup=False
    )


@artifacts_app.command()
def prune(
    workspace: WorkspaceOption = Path("workspace"),
    unused_days: Annotated[float, typer.Option(min=0, max=36500, help="Keep what was used within so many days.")] = 30,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what has not been used for long and what interrupted runs left, but nothing that a model with an alias needs."""
    from pipeline.run import lineage as pruning

    _store(workspace)
    planned = pruning.plan_pruning(workspace, unused_days)
    gone = pruning.prune(planned) if yes else planned
    names, size = [one.name for one in gone], sum(one.size for one in gone)
    if as_json:
        print_json({"removed": yes, "artifacts": names, "bytes": size})
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


def generate(
    model: Annotated[
        str, typer.Argument(help="`models:/NAME@champion`, `models:/NAME/1`, an adapter folder, or a merged one.")
    ],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts; `-` reads lines from stdin.")
    ],
    workspace: WorkspaceOption = Path("workspace"),
    base: BaseOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts with a registered model, an adapter or a merged folder; one answer a line."""
    from pipeline.serving.answer import answer

    for prompt in prompts:
        name, assigned, value = prompt.partition("=")
        if assigned and name in ("workspace", "base", "max_new_tokens") and not any(map(str.isspace, prompt)):
            raise ModelError(
                f"{prompt} is no prompt but a setting; write --{name.replace('_', '-')} {shlex.quote(value)} (or give the "
                "text on stdin, with - as the prompt)"
            )
    texts = [line.rstrip("\n") for prompt in prompts for line in (sys.stdin if prompt == "-" else [prompt])]
    answers = answer(model, texts, workspace, base, max_new_tokens)
    print(json.dumps({"model": model, "answers": answers}) if as_json else "\n".join(answers))


def serve(
    model: Annotated[
        str, typer.Argument(help="`models:/NAME@champion`, `models:/NAME/1`, an adapter folder, or a merged one.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; `0.0.0.0` lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    workspace: WorkspaceOption = Path("workspace"),
    base: BaseOption = None,
) -> None:
    """Serve a model with OpenAI's interface (chat, completions, streaming) by `transformers serve`, until Ctrl-C."""
    from pipeline.serving.openai_server import serving

    with serving(model, workspace, base, host, port) as endpoint:
        out.print(f"{escape(endpoint.name)} answers at {endpoint.address}/v1")
        if endpoint.request:
            out.print(f"\n  {escape(endpoint.request)}")
        endpoint.wait()


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="An adapter folder, `models:/NAME@champion`, or `models:/NAME/1`."),
    ],
    out: NewFolderArgument,
    format_: Annotated[
        Literal["lora", "merged", "peft-kasa"],
        typer.Option("--format", help="A plain LoRA, a merged Hugging Face folder, or PEFT's KaSA."),
    ],
    base: BaseOption = None,
    pad_rank: Annotated[bool, typer.Option("--pad-rank", help="lora: pad with zeros to a rank vLLM accepts.")] = False,
    dtype: Annotated[
        Literal["fp32", "bf16", "stored"],
        typer.Option(help="Storage type; `stored`: the base's for merged, fp32 for the others."),
    ] = "stored",
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """Write an adapter in a form that other programs load: PEFT, vLLM, transformers."""
    from pipeline.serving.export import export as export_adapter

    exported = export_adapter(model, out, format_, workspace, base, pad_rank, dtype)
    show(exported, as_json, _exported_json, _show_exported)


def import_(
    peft_folder: Annotated[
        Path, typer.Argument(metavar="PEFT_FOLDER", parser=user_path, help="A KaSA adapter saved by PEFT.")
    ],
    out: NewFolderArgument,
    base: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", parser=user_path, help="The Hugging Face folder of the base model it was trained on."
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Take over a KaSA adapter saved by PEFT."""
    from pipeline.serving.export import import_folder

    show(import_folder(peft_folder, out, base), as_json, _exported_json, _show_exported)


def _exported_json(exported: Exported) -> dict[str, Any]:
    return {**dataclasses.asdict(exported), "out": str(exported.out)}


def _show_exported(exported: Exported) -> None:
    """Print what was written, how far it is from the adapter where that was measured, and what to type next."""
    rank = f", rank {exported.rank}" if exported.rank else ""
    dtypes = ", ".join(exported.dtypes)
    shared.out.print(f"{escape(str(exported.out))}: {exported.format}{rank}, {dtypes}, {size_text(exported.size)}")
    if exported.logits:
        largest, scale = exported.logits.largest, exported.logits.largest_logit
        shared.out.print(f"largest logit difference from the adapter {largest:.2g}, of logits up to {scale:.3g} (fp32)")
    for note in exported.notes:
        shared.out.print(f"note: {escape(note)}")
    for command in filter(None, (exported.command, exported.request)):
        shared.out.print(f"\n  {escape(command)}")


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
    show(changed, as_json, _change_json, partial(_show_change, workspace))


def rollback(
    name: Annotated[str, typer.Argument(help="The registered model.")],
    reason: ReasonOption = None,
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion the champion again; a second time leads back."""
    from pipeline.apps.models import rollback as roll_back

    changed = roll_back(workspace, name, reason)
    show(changed, as_json, _change_json, partial(_show_change, workspace))


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


def _show_change(workspace: Path, change: Change) -> None:
    """Print which version is the champion now, and how to undo it."""
    if not change.changed:
        out.print(f"{escape(change.name)}: version {change.champion} is the champion already")
        return
    before = f"; before it version {change.before}" if change.before else ""
    out.print(f"[green]{escape(change.name)}: version {change.champion} is the champion now[/]{before}")
    if change.undo:
        out.print(f"back again: {change.undo}", markup=False)


def _difference(row: ModelRow) -> str:
    return "-" if row.difference is None else escape(f"{row.difference.text()} against the {row.opponent}")
