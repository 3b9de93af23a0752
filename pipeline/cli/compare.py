"""The commands that compare models, `kasa compare` and `kasa judge`, and what they print."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from pipeline.cli.shared import (
    BaseOption,
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    RunWorkspaceOption,
    TuneOption,
    WorkspaceOption,
    out,
    plain_table,
    print_json,
    read_recipe,
    show,
)
from pipeline.core.console import ProgressBars
from pipeline.core.files import user_path

if TYPE_CHECKING:
    from pipeline.apps.compare import Compared
    from pipeline.apps.compared_methods import ComparisonPlan, TrialPlan
    from pipeline.apps.judgement import Judgement

_TWO_DECIMALS = "{:.2f}".format

# Columns of the paper's table that say how a method did. What it took is a table of its own here, for narrow terminals.
_RESULTS = slice(3, 7)


def judge(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, or an adapter folder.")],
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS.jsonl", parser=user_path, help="Questions in MT-Bench's form.")
    ],
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
    from pipeline.apps.judge import Judge
    from pipeline.apps.judgement import AnswerSettings, judge_models
    from pipeline.core.machine import fast_precision

    asked = Judge(endpoint, judge_model, os.environ.get(key_variable), workspace / "judgements" / "verdicts.jsonl")
    settings = AnswerSettings(max_new_tokens, batch_size, workers, gpu, fast_precision(gpu))
    with ProgressBars().showing() as bars:
        result = judge_models(model, against, prompts, asked, settings, workspace, base, bars)
    show(result, as_json, lambda judgement: judgement.as_json(), _show_judgement)


def _show_judgement(judgement: Judgement) -> None:
    """Print grades and comparison as a table, and what they come to in words."""
    from pipeline.metrics.intervals import LEAST_SAMPLES

    table = Table(box=None, header_style="bold")
    table.add_column("mean grade, 1 to 10")
    for who in judgement.grades:
        table.add_column(escape(who), justify="right")
    for category, of in judgement.by_category.items():
        table.add_row(escape(category), *(f"{of[who]:.2f}" if who in of else "" for who in judgement.grades))
    grades = (grade.text(_TWO_DECIMALS) for grade in judgement.grades.values())
    table.add_row(f"all {judgement.questions} questions", *grades)
    out.print(table)
    out.print(f"difference  {judgement.difference.text('{:+.2f}'.format)}")
    out.print(
        f"win rate    {judgement.win_rate.text(_TWO_DECIMALS)} of the comparisons, in both orders; a draw counts half"
    )
    low, high = judgement.win_rate.low, judgement.win_rate.high
    verdict = (
        "too few questions to say whether the judge prefers"
        if judgement.questions < LEAST_SAMPLES
        else "the judge prefers"
        if low > 0.5
        else "the judge likes less"
        if high < 0.5
        else "the judge shows no preference for"
    )
    out.print(f"{verdict} {escape(judgement.model)} (95% intervals over questions; judge {escape(judgement.judge)})")
    if judgement.unreadable:
        out.print(f"{judgement.unreadable} of {judgement.asked} of its answers named no grade or verdict")
    out.print(f"{judgement.folder}")


def compare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    methods: Annotated[
        str, typer.Option(metavar="A,B,...", help="What to compare; docs/compare.md has the names.")
    ] = "kasa,lora",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each method.")] = 3,
    seed_from: Annotated[int | None, typer.Option(help="The first seed; default: train.seed.")] = None,
    tune: TuneOption = None,
    against: Annotated[
        str | None, typer.Option(metavar="METHOD", help="What all are held against; default: lora, or else the base.")
    ] = None,
    side_by_side: Annotated[
        int | None, typer.Option(min=1, help="Trials at once at most; default: as many as the cluster has room for.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the trials and what is cached; make nothing.")
    ] = False,
    workspace: RunWorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods on a recipe: the same data, steps and parameter budget; intervals, tests, costs, a plot."""
    resolved = read_recipe(recipe, overrides, workspace)
    from pipeline.apps.compare import compare as compare_methods
    from pipeline.apps.compared_methods import method_names, plan_comparison, plan_trials, tuned_rates

    rates = tuned_rates(tune, resolved)
    planned = plan_comparison(resolved, method_names(methods), seeds, seed_from, rates, against)
    if dry_run:
        from pipeline.run.preflight import check_before_work

        found, trials = check_before_work(resolved), plan_trials(planned)
        print_json(_planned_json(planned, trials)) if as_json else _show_planned(planned, trials)
        found.require()
        return
    show(compare_methods(planned, ProgressBars(), side_by_side), as_json, _compared_json, show_compared)


def _compared_json(compared: Compared) -> dict[str, Any]:
    """The values of a comparison for JSON."""
    from pipeline.apps.comparison_analysis import findings_json

    return {
        "name": compared.plan.name,
        "run_id": compared.run_id,
        "folder": str(compared.folder),
        "trials": compared.trials,
        "reused": compared.reused,
        **findings_json(compared.findings),
    }


def show_compared(compared: Compared) -> None:
    """Print the table, the conclusion, what it does not say, and where the rest is."""
    from pipeline.apps.comparison_analysis import table

    found = compared.findings
    head, rows = table(found)
    lines = [head, *rows]
    _print_table([line[:1] + line[_RESULTS] for line in lines])
    out.print()
    _print_table([line[: _RESULTS.start] + line[_RESULTS.stop :] for line in lines])
    out.print(f"\n{escape(found.conclusion)}")
    for limit in found.limits:
        out.print(f"- {escape(limit)}")
    out.print(f"\n{compared.trials} trials, {compared.reused} of them finished before")
    out.print(f"in full  {compared.folder / 'comparison.md'}")


def _print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print lines, the first of which is the head. Cells that are too wide are folded: no digit is left out."""
    head, *rows = lines
    words = [max((len(word) for word in name.split()), default=0) for name in head]
    columns = [Column(name, overflow="fold", min_width=word) for name, word in zip(head, words, strict=True)]
    columns[0].no_wrap = True
    shown = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, header_style="bold")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    out.print(shown)


def _planned_json(plan: ComparisonPlan, trials: Sequence[TrialPlan]) -> dict[str, Any]:
    return {"name": plan.name, "trials": [dataclasses.asdict(trial) for trial in trials]}


def _show_planned(plan: ComparisonPlan, trials: Sequence[TrialPlan]) -> None:
    """Print a line for each trial, with what is there of it."""
    out.print(f"comparison {escape(plan.name)}, against {escape(plan.against)}")
    shown = plain_table("trial", "trains", "reuses", "makes")
    for trial in trials:
        known = trial.reused or trial.made
        shown.add_row(
            escape(trial.name),
            "" if trial.parameters is None else f"{trial.parameters:,}",
            ", ".join(trial.reused),
            ", ".join(trial.made) or ("nothing" if known else "known once earlier trials and inputs are there"),
        )
    out.print(shown)
