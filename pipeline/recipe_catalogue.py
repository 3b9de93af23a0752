"""The recipes that come along, with what each needs: for `kasa recipes` and docs/recipes.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe_files import named_recipes


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe that comes along."""

    name: str
    file: Path
    recipe: Recipe

    @property
    def family(self) -> str:
        """The folder it is kept in."""
        return self.file.parent.name

    @property
    def fetched(self) -> list[str]:
        """What comes from the hub or from other addresses, if it is not named as local files."""
        model = [] if self.recipe.base.model.startswith("embedded:") else [self.recipe.base.model]
        sources = [*self.recipe.data.train, *self.recipe.data.heldout]
        return model + [source for source in sources if source.startswith(("hub:", "http"))]

    @property
    def hardware(self) -> str:
        """What it trains on as it stands."""
        workers = self.recipe.train.workers
        if not self.recipe.train.gpu:
            return f"{workers} CPU core{'s' if workers > 1 else ''}"
        return f"{workers} GPU{'s' if workers > 1 else ''}"

    @property
    def published(self) -> str:
        """The published result; empty where there is none."""
        return ", ".join(f"{metric} {value:g}" for metric, value in self.recipe.about.published.items())


def catalogue() -> Iterator[NamedRecipe]:
    """All of them, those at the top first, then family by family."""
    for name, file in named_recipes().items():
        yield NamedRecipe(name, file, load_recipe(file))
