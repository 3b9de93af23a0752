"""The command line, `kasa`.

Exit codes: 0 done; 2 the user's mistake, one clear error and no traceback; 1 failure, with the traceback in a file.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from kasa.errors import KasaError
from pipeline.console import ProgressBars, console
from pipeline.errors import WorkspaceError
from pipeline.recipe import load_recipe

if TYPE_CHECKING:
    from pipeline.export import Exported

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune LLaMA-class models with KaSA: Ray, DeepSpeed ZeRO, MLflow.",
)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe; docs/recipe.md lists its keys.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
BaseOption = Annotated[Path | None, typer.Option(help="The base model's folder, where it was moved.")]
WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="The workspace of the runs.")]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved recipe and the plan; touch nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: prepare, spectra, train, evaluate, register. What is unchanged is reused."""
    resolved = load_recipe(recipe, overrides)
    from pipeline import present

    if dry_run:
        from pipeline.dry_run import plan_run

        planned = plan_run(resolved)
        print(json.dumps(present.plan_json(planned))) if as_json else present.show_plan(planned)
        return
    from pipeline.flow import run as run_flow

    result = run_flow(resolved, ProgressBars())
    print(json.dumps(present.result_json(result))) if as_json else present.show_result(result)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs on each node; default: as the recipe has it.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes with that many GPUs each.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="The GPU's name, such as H100: sets its memory and peak.")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=1, help="Memory of one GPU in GiB.")] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Peak of one worker in TFLOPS, in the recipe's precision.")
    ] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak that training reaches.")] = 0.4,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe needs, from the model's configuration alone: memory by ZeRO stage, steps, FLOPs, time, disk."""
    from pipeline import present
    from pipeline.plan import hardware_of, plan_training

    resolved, hardware = hardware_of(
        load_recipe(recipe, overrides), gpus, nodes, gpu, gpu_memory_gib, peak_tflops, utilisation
    )
    estimate = plan_training(resolved, hardware)
    print(json.dumps(present.estimate_json(estimate))) if as_json else present.show_estimate(estimate)


@app.command()
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
    from pipeline.answer import answer

    texts = [line.rstrip("\n") for prompt in prompts for line in (sys.stdin if prompt == "-" else [prompt])]
    answers = answer(model, texts, workspace, base, max_new_tokens)
    if as_json:
        print(json.dumps({"model": model, "answers": answers}))
    else:
        print("\n".join(answers))


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="An adapter folder, `models:/NAME@champion`, or `models:/NAME/1`."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
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
    from pipeline.export import export as export_adapter

    _end_export(export_adapter(model, out, format_, workspace, base, pad_rank, dtype), as_json)


@app.command("import")
def import_(
    peft_folder: Annotated[Path, typer.Argument(metavar="PEFT_FOLDER", help="A KaSA adapter saved by PEFT.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    base: Annotated[Path, typer.Option(help="The Hugging Face folder of the base model it was trained on.")],
    as_json: JsonOption = False,
) -> None:
    """Take over a KaSA adapter saved by PEFT."""
    from pipeline.export import import_folder

    _end_export(import_folder(peft_folder, out, base), as_json)


def _end_export(exported: Exported, as_json: bool) -> None:
    from pipeline import present

    print(json.dumps(present.exported_json(exported))) if as_json else present.show_exported(exported)


@app.command()
def doctor(workspace: WorkspaceOption = Path("workspace"), as_json: JsonOption = False) -> None:
    """Say what this machine has and lacks for a run; exit code 2 if a run cannot work."""
    from pipeline import present
    from pipeline.doctor import examine

    findings = examine(workspace)
    print(json.dumps(present.findings_json(findings))) if as_json else present.show_findings(findings)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(2)


def main() -> None:
    """Entry point of the `kasa` command."""
    warnings.filterwarnings("ignore")
    try:
        app()
    except KasaError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            _fail(error)
        full = WorkspaceError(
            f"{error.filename or 'the workspace'} cannot be written: {error.strerror}; free some space and run again"
        )
        console.print(f"[bold red]error:[/] {escape(str(full))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        sys.exit(130)
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> None:
    with tempfile.NamedTemporaryFile("w", prefix="kasa-failure-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    console.print(f"[bold red]failed:[/] {type(error).__name__}: {escape(first)}", soft_wrap=True)
    console.print(f"the traceback is in {file.name}; the same command goes on from here", soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
