"""The command line, `kasa`.

Exit codes: 0 done; 2 the user's mistake, one clear error and no traceback; 1 failure, with the traceback in a file.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from kasa.errors import KasaError
from pipeline.cli.artifacts import app as artifacts_app
from pipeline.cli.options import (
    BaseOption,
    JsonOption,
    OverridesArgument,
    ReasonOption,
    RecipeArgument,
    WorkspaceOption,
)
from pipeline.config.recipe import load_recipe
from pipeline.core.console import ProgressBars, console
from pipeline.core.errors import WorkspaceError

if TYPE_CHECKING:
    from pipeline.serving.export import Exported

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune LLaMA-class models with KaSA: Ray, DeepSpeed ZeRO, MLflow.",
)

app.add_typer(artifacts_app, name="artifacts")


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved recipe and the plan; touch nothing.")
    ] = False,
    force: Annotated[
        list[str] | None, typer.Option("--force", metavar="STAGE", help="Recompute this stage; may be given again.")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Recompute this stage and all after it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: prepare, spectra, audit, train, evaluate, register. What is unchanged is reused."""
    resolved = load_recipe(recipe, overrides)
    from pipeline.cli import present
    from pipeline.run.graph import stages_to_recompute

    recompute = stages_to_recompute(force or [], from_)

    if dry_run:
        from pipeline.apps.planning.dry_run import plan_run

        planned = plan_run(resolved, recompute)
        print(json.dumps(present.plan_json(planned))) if as_json else present.show_plan(planned)
        return
    from pipeline.run.flow import run as run_flow

    result = run_flow(resolved, ProgressBars(), recompute)
    print(json.dumps(present.result_json(result))) if as_json else present.show_result(result)


@app.command()
def retrain(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Where another retraining is running, wait for its end.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe if its data, base, settings or code are new since the last retraining: for a scheduler to call."""
    resolved = load_recipe(recipe, overrides)
    from pipeline.apps.retrain import outcome_json, retrain_if_new

    outcome = retrain_if_new(resolved, wait)
    if outcome.result is None:
        print(json.dumps(outcome_json(outcome)) if as_json else f"nothing to do: {outcome.reason}")
        return
    from pipeline.cli import present

    if as_json:
        print(json.dumps(outcome_json(outcome) | present.result_json(outcome.result)))
    else:
        present.show_result(outcome.result)


@app.command()
def compare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    methods: Annotated[
        str, typer.Option(metavar="A,B,...", help="What to compare; docs/compare.md has the names.")
    ] = "kasa,lora",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each method.")] = 3,
    seed_from: Annotated[int | None, typer.Option(help="The first seed; default: train.seed.")] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="lr|learning_rate=A,B,...", help="Choose each method's rate on the validation samples first."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="METHOD", help="What all are held against; default: lora, or else the base.")
    ] = None,
    side_by_side: Annotated[
        int | None, typer.Option(min=1, help="Trials at once at most; default: as many as the cluster has room for.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the trials and what is cached; touch nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare methods on a recipe: the same data, steps and parameter budget; intervals, tests, costs, a plot."""
    resolved = load_recipe(recipe, overrides)
    from pipeline.apps.compare.methods import entrant_names, tuned_rates
    from pipeline.apps.compare.run import compare as compare_methods
    from pipeline.apps.compare.run import plan_comparison, plan_trials
    from pipeline.cli import compare as present

    rates = tuned_rates(tune, resolved)
    planned = plan_comparison(resolved, entrant_names(methods), seeds, seed_from, rates, against)
    if dry_run:
        trials = plan_trials(planned)
        print(json.dumps(present.planned_json(planned, trials))) if as_json else present.show_planned(planned, trials)
        return
    compared = compare_methods(planned, ProgressBars(), side_by_side)
    print(json.dumps(present.compared_json(compared))) if as_json else present.show_compared(compared)


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
    from pipeline.apps.planning.plan import hardware_of, plan_training
    from pipeline.cli import present

    resolved, hardware = hardware_of(
        load_recipe(recipe, overrides), gpus, nodes, gpu, gpu_memory_gib, peak_tflops, utilisation
    )
    estimate = plan_training(resolved, hardware)
    print(json.dumps(present.estimate_json(estimate))) if as_json else present.show_estimate(estimate)


@app.command()
def judge(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, or an adapter folder.")],
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS.jsonl", help="Questions in MT-Bench's form.")],
    endpoint: Annotated[str, typer.Option(help="The judge's OpenAI-compatible address, up to /v1.")],
    judge_model: Annotated[str, typer.Option("--judge", help="The judge's model name there.")],
    against: Annotated[str, typer.Option(help="The other model; `base`: the same without its adapter.")] = "base",
    key_variable: Annotated[str, typer.Option(help="Environment variable with the key, if one is wanted.")] = (
        "OPENAI_API_KEY"
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once by a worker.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 1,
    gpu: Annotated[bool, typer.Option(help="Give each of them a GPU.")] = False,
    base: BaseOption = None,
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """Have two models answer questions and a judge grade and compare the answers."""
    from pipeline.apps.judge.judge import Judge
    from pipeline.apps.judge.judgement import AnswerSettings, judge_models
    from pipeline.cli.judge import show_judgement
    from pipeline.core.machine import fast_precision

    asked = Judge(endpoint, judge_model, os.environ.get(key_variable), workspace / "judgements" / "verdicts.jsonl")
    settings = AnswerSettings(max_new_tokens, batch_size, workers, gpu, fast_precision(gpu))
    with ProgressBars().showing() as bars:
        result = judge_models(model, against, prompts, asked, settings, workspace, base, bars)
    print(json.dumps(result.as_json())) if as_json else show_judgement(result)


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come along; every command that takes a recipe takes their names."""
    from pipeline.config.catalogue import catalogue, recipes_json, show_recipes

    named = list(catalogue())
    print(json.dumps(recipes_json(named))) if as_json else show_recipes(named)


@app.command()
def submit(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as http://HEAD:8265."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show the job's log until it ends; the exit code is the job's.")
    ] = True,
    again: Annotated[
        bool, typer.Option("--again", help="Start it anew though the same job has succeeded before.")
    ] = False,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="One more environment variable for the job.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe as a job on a Ray cluster; the same submission twice is one job."""
    from pipeline.apps.jobs.submit import submit_and_follow

    outcome = submit_and_follow(recipe, overrides or [], address, follow, again, env or [])
    if as_json:
        print(json.dumps(outcome.as_json()))
    raise typer.Exit(outcome.exit_code)


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
    from pipeline.serving.answer import answer

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
    from pipeline.serving.export import export as export_adapter

    _end_export(export_adapter(model, out, format_, workspace, base, pad_rank, dtype), as_json)


@app.command("import")
def import_(
    peft_folder: Annotated[Path, typer.Argument(metavar="PEFT_FOLDER", help="A KaSA adapter saved by PEFT.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    base: Annotated[Path, typer.Option(help="The Hugging Face folder of the base model it was trained on.")],
    as_json: JsonOption = False,
) -> None:
    """Take over a KaSA adapter saved by PEFT."""
    from pipeline.serving.export import import_folder

    _end_export(import_folder(peft_folder, out, base), as_json)


def _end_export(exported: Exported, as_json: bool) -> None:
    from pipeline.cli import present

    print(json.dumps(present.exported_json(exported))) if as_json else present.show_exported(exported)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="A registered model; left out: all of them.")] = None,
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """List the registered versions: aliases, verdict, the metric it was given on, and where they come from."""
    from pipeline.apps.models import list_models
    from pipeline.cli.models import models_json, show_models

    rows = list_models(workspace, name)
    print(json.dumps(models_json(rows))) if as_json else show_models(rows)


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="`models:/NAME/3` or `models:/NAME@challenger`.")],
    reason: ReasonOption = None,
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion by hand; the champion before it becomes the previous one."""
    from pipeline.apps.models import promote as promote_version
    from pipeline.cli.models import change_json, show_change

    changed = promote_version(workspace, model, reason)
    print(json.dumps(change_json(changed))) if as_json else show_change(changed)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The registered model.")],
    reason: ReasonOption = None,
    workspace: WorkspaceOption = Path("workspace"),
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion the champion again; a second time leads back."""
    from pipeline.apps.models import rollback as roll_back
    from pipeline.cli.models import change_json, show_change

    changed = roll_back(workspace, name, reason)
    print(json.dumps(change_json(changed))) if as_json else show_change(changed)


@app.command()
def doctor(workspace: WorkspaceOption = Path("workspace"), as_json: JsonOption = False) -> None:
    """Say what this machine has and lacks for a run; exit code 2 if a run cannot work."""
    from pipeline.apps.doctor import examine
    from pipeline.cli import present

    findings = examine(workspace)
    print(json.dumps(present.findings_json(findings))) if as_json else present.show_findings(findings)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(2)


def main() -> None:
    """Entry point of the `kasa` command."""
    warnings.filterwarnings("ignore")
    end_on_sigterm()
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
    finally:
        gc.freeze()  # else the interpreter's end looks through all modules for what could be freed: 2 to 3 s


def end_on_sigterm() -> None:
    """Let SIGTERM, with which schedulers stop a process, end it in order: leases are given back, runs are marked."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


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
