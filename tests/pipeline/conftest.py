"""A recipe to vary."""

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.config.recipe import Recipe, parse_recipe

# With a rule that drops something, so that there is every stage. The precision, too: its default is a matter of the hardware.
VALUES: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": ["rows.jsonl"]},
    "adapter": {"truncation": "loss"},
    "train": {"precision": "bf16"},
}


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """`recipe({"train.workers": 2})`: a small recipe with some keys changed."""

    def build(changes: dict[str, Any] | None = None) -> Recipe:
        values: dict[str, Any] = {name: dict(v) if isinstance(v, dict) else v for name, v in VALUES.items()}
        for dotted, value in (changes or {}).items():
            *sections, key = dotted.split(".")
            block = values
            for section in sections:
                block = block.setdefault(section, {})
            block[key] = value
        return parse_recipe(values, "recipe.yaml")

    return build
