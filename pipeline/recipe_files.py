"""Where recipes are: files of the user's, or those that come along, by name (`kasa run glue-roberta-base-sst2`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from kasa.errors import nearest
from pipeline.errors import RecipeError


def named_recipes() -> dict[str, Path]:
    """The files of the recipes that come along, by name: those at the top first, then family by family."""
    package = find_spec("recipes")  # no part of what goes along with a registered model
    if package is None or package.origin is None:
        return {}
    folder = Path(package.origin).parent
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (file.parent != folder, file))
    return {file.stem: file for file in files}


def find_recipe(path: Path) -> Path:
    """The recipe's file: `path` where there is one, else the recipe of that name.

    Raises:
        RecipeError: there is neither.
    """
    if path.exists():
        return path
    named = named_recipes()
    if str(path) in named:
        return named[str(path)]
    raise RecipeError(
        f"recipe {path} does not exist; give a YAML file, or a name that `kasa recipes` lists{nearest(str(path), named)}"
    )
