"""The shipped recipes, as `kasa recipes` lists them and `docs/recipes.md` describes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config.recipe import Recipe, load_recipe, named_recipes

_out = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class NamedRecipe:
    """A shipped recipe.

    Attributes:
        name: The name that commands take in place of a file.
        file: Its YAML file.
        recipe: Its content, validated.
    """

    name: str
    file: Path
    recipe: Recipe

    @property
    def family(self) -> str:
        """The name of the folder that holds it."""
        return self.file.parent.name

    @property
    def fetched(self) -> list[str]:
        """The base model and data sources that a run would download, unless they are replaced by local files."""
        model = [] if self.recipe.base.model.startswith("embedded:") else [self.recipe.base.model]
        sources = [*self.recipe.data.train, *self.recipe.data.heldout]
        return model + [source for source in sources if source.startswith(("hub:", "http"))]

    @property
    def hardware(self) -> str:
        """The hardware that it asks for, such as `4 GPUs`."""
        workers = self.recipe.train.workers
        if not self.recipe.train.gpu:
            return f"{workers} CPU core{'s' if workers > 1 else ''}"
        return f"{workers} GPU{'s' if workers > 1 else ''}"

    @property
    def published(self) -> str:
        """The published result, such as `accuracy 95.2`; empty if there is none."""
        return ", ".join(f"{metric} {value:g}" for metric, value in self.recipe.about.published.items())


def catalogue() -> Iterator[NamedRecipe]:
    """All shipped recipes in the order of `named_recipes`."""
    for name, file in named_recipes().items():
        yield NamedRecipe(name, file, load_recipe(file))


def recipes_json(named: Sequence[NamedRecipe]) -> list[dict[str, Any]]:
    """The recipes as JSON objects, for `kasa recipes --json`."""
    return [
        {
            "name": one.name,
            "family": one.family,
            **one.recipe.about.model_dump(mode="json"),
            "base": one.recipe.base.model,
            "hardware": one.hardware,
            "fetched": one.fetched,
        }
        for one in named
    ]


def show_recipes(named: Sequence[NamedRecipe]) -> None:
    """Print the recipes as a table."""
    table = Table(box=None, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    for heading in ("what", "settings", "trains on"):
        table.add_column(heading)
    for one in named:
        about = one.recipe.about
        table.add_row(one.name, about.summary, about.settings, one.hardware)
    _out.print(table)
    _out.print(
        "kasa run NAME --dry-run shows one; data.train=FILE and base.model=FOLDER name local copies", style="dim"
    )
