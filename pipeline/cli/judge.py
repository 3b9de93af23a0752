"""A judgement for people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.apps.judge.judgement import Judgement

_out = Console(highlight=False, soft_wrap=True)
_TWO_DECIMALS = "{:.2f}".format


def show_judgement(judgement: Judgement) -> None:
    """Grades and comparison as a table, and what they come to in words."""
    table = Table(box=None, header_style="bold")
    table.add_column("mean grade, 1 to 10")
    for who in judgement.grades:
        table.add_column(escape(who), justify="right")
    for category, of in judgement.by_category.items():
        table.add_row(escape(category), *(f"{of[who]:.2f}" if who in of else "" for who in judgement.grades))
    grades = (grade.text(_TWO_DECIMALS) for grade in judgement.grades.values())
    table.add_row(f"all {judgement.questions} questions", *grades)
    _out.print(table)
    _out.print(f"difference  {judgement.difference.text('{:+.2f}'.format)}")
    _out.print(
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
    _out.print(f"{verdict} {escape(judgement.model)} (95% intervals over questions; judge {escape(judgement.judge)})")
    if judgement.unreadable:
        _out.print(f"{judgement.unreadable} of {judgement.asked} of its answers named no grade or verdict")
    _out.print(f"{judgement.folder}")
