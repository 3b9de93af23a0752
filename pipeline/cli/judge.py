"""`kasa judge` and what it prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.cli.shared import BaseOption, JsonOption, WorkspaceOption, out, show
from pipeline.core.console import ProgressBars

if TYPE_CHECKING:
    from pipeline.apps.judge.judgement import Judgement

_TWO_DECIMALS = "{:.2f}".format


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
    from pipeline.core.machine import fast_precision

    asked = Judge(endpoint, judge_model, os.environ.get(key_variable), workspace / "judgements" / "verdicts.jsonl")
    settings = AnswerSettings(max_new_tokens, batch_size, workers, gpu, fast_precision(gpu))
    with ProgressBars().showing() as bars:
        result = judge_models(model, against, prompts, asked, settings, workspace, base, bars)
    show(result, as_json, lambda judgement: judgement.as_json(), _show_judgement)


def _show_judgement(judgement: Judgement) -> None:
    """Print grades and comparison as a table, and what they come to in words."""
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
        "the judge prefers"
        if low > 0.5
        else "the judge likes less"
        if high < 0.5
        else "the judge shows no preference for"
    )
    out.print(f"{verdict} {escape(judgement.model)} (95% intervals over questions; judge {escape(judgement.judge)})")
    if judgement.unreadable:
        out.print(f"{judgement.unreadable} of {judgement.asked} of its answers named no grade or verdict")
    out.print(f"{judgement.folder}")
