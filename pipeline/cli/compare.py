"""`kasa compare` and what it prints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from pipeline.cli.shared import JsonOption, OverridesArgument, RecipeArgument, out, plain_table, show
from pipeline.config.recipe import load_recipe
from pipeline.core.console import ProgressBars

if TYPE_CHECKING:
    from pipeline.apps.compare.plan import ComparisonPlan, TrialPlan
    from pipeline.apps.compare.run import Compared

# Columns of the paper's table that say how a method did. What it took is a table of its own here, for narrow terminals.
_RESULTS = slice(3, 7)


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
    from pipeline.apps.compare.methods import method_names, tuned_rates
    from pipeline.apps.compare.plan import plan_comparison, plan_trials
    from pipeline.apps.compare.run import compare as compare_methods

    rates = tuned_rates(tune, resolved)
    planned = plan_comparison(resolved, method_names(methods), seeds, seed_from, rates, against)
    if dry_run:
        trials = plan_trials(planned)
        print(json.dumps(_planned_json(planned, trials))) if as_json else _show_planned(planned, trials)
        return
    show(compare_methods(planned, ProgressBars(), side_by_side), as_json, _compared_json, show_compared)


def _compared_json(compared: Compared) -> dict[str, Any]:
    """The values of a comparison for JSON."""
    from pipeline.apps.compare.paper import findings_json

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
    from pipeline.apps.compare.paper import table

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
