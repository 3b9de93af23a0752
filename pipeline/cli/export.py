"""The commands that use an adapter, `kasa generate`, `kasa export` and `kasa import`, and what they print."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from pipeline.cli import shared
from pipeline.cli.shared import BaseOption, JsonOption, WorkspaceOption, show, size_text

if TYPE_CHECKING:
    from pipeline.serving.export import Exported

NewFolderArgument = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")]


def generate(
    model: Annotated[str, typer.Argument(help="`models:/NAME@champion`, `models:/NAME/1`, or an adapter folder.")],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts; `-` reads lines from stdin.")
    ],
    workspace: WorkspaceOption = Path("workspace"),
    base: BaseOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts with a registered model or an adapter folder; one answer a line."""
    from pipeline.serving.answer import answer

    texts = [line.rstrip("\n") for prompt in prompts for line in (sys.stdin if prompt == "-" else [prompt])]
    answers = answer(model, texts, workspace, base, max_new_tokens)
    print(json.dumps({"model": model, "answers": answers}) if as_json else "\n".join(answers))


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
    peft_folder: Annotated[Path, typer.Argument(metavar="PEFT_FOLDER", help="A KaSA adapter saved by PEFT.")],
    out: NewFolderArgument,
    base: Annotated[Path, typer.Option(help="The Hugging Face folder of the base model it was trained on.")],
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
    shared.out.print(f"\n  {escape(exported.command)}")
