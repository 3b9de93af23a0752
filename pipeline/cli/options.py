"""Command line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.files import local_folder

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe; docs/recipe.md lists its keys.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
BaseOption = Annotated[Path | None, typer.Option(help="The base model's folder, where it was moved.")]
WorkspaceOption = Annotated[
    Path,
    typer.Option("--workspace", "-w", metavar="FOLDER|URL", parser=local_folder, help="The workspace of the runs."),
]
ReasonOption = Annotated[str | None, typer.Option(help="Why; recorded on the version.")]
