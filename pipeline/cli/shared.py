"""What commands share: options, and how results are printed (to stdout, for people with rich or for programs as JSON)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.table import Table

from pipeline.config.recipe import Recipe, load_recipe
from pipeline.core.console import RedactingConsole
from pipeline.core.files import local_folder, user_path
from pipeline.core.redaction import redacted_values

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", parser=user_path, help="The recipe; docs/recipe.md lists its keys.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
BaseOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", parser=user_path, help="The base model's folder, where it was moved.")
]
WorkspaceOption = Annotated[
    Path,
    typer.Option("--workspace", "-w", metavar="FOLDER|URL", parser=local_folder, help="The workspace of the runs."),
]
TuneOption = Annotated[
    str | None,
    typer.Option(metavar="lr|learning_rate=A,B,...", help="Choose the learning rate on the validation samples first."),
]
RunWorkspaceOption = Annotated[
    str | None,
    typer.Option("--workspace", "-w", metavar="FOLDER|URL", help="The run's workspace: the same as workspace=FOLDER."),
]
ReasonOption = Annotated[str | None, typer.Option(help="Why; recorded on the version.")]

out = RedactingConsole(highlight=False, soft_wrap=True)


def with_workspace(overrides: Sequence[str] | None, workspace: str | None) -> list[str]:
    """The changes to a recipe, with the option `--workspace` as one of them."""
    return [*(overrides or []), *([f"workspace={json.dumps(workspace)}"] if workspace is not None else [])]


def read_recipe(recipe: Path, overrides: Sequence[str] | None, workspace: str | None) -> Recipe:
    """The recipe that a command was given, with its changes."""
    return load_recipe(recipe, with_workspace(overrides, workspace))


Result = TypeVar("Result")


def show(result: Result, as_json: bool, values: Callable[[Result], object], print_: Callable[[Result], None]) -> None:
    """Print a result: as one JSON object of its `values`, or for people with `print_`."""
    if as_json:
        print_json(values(result))
    else:
        print_(result)


def print_json(values: object) -> None:
    """Print one JSON object, without secrets."""
    print(json.dumps(redacted_values(values)))


def plain_table(*columns: str) -> Table:
    """A table without lines, its header in bold."""
    return Table(*columns, box=None, pad_edge=False, header_style="bold")


def uncut(table: Table) -> Table:
    """The table at its full width: names that are to be copied must not be cut, however narrow the terminal."""
    table.width = out.measure(table, options=out.options.update(width=1000)).maximum
    return table


def size_text(size: float) -> str:
    """Bytes in MiB, or in GiB from one GiB on."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def duration_text(seconds: float) -> str:
    """Seconds, minutes from two of them on, or hours from two of them on."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
