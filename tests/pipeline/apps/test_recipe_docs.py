"""docs/recipe.md says what the models say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from pipeline.apps.recipe_docs import (
    DOCS,
    catalogue_page,
    default_text,
    flat_keys_of,
    keys_of,
    main,
    recipe_page,
    section_of,
    type_text,
)
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.config.section import StrList
from pipeline.config.settings import DataSettings, TrainSettings
from pipeline.core.errors import RecipeError


def _sections(page: str) -> dict[str, str]:
    """Heading -> its text."""
    return {part.partition("\n")[0].strip("` "): part.partition("\n")[2] for part in page.split("\n## ")[1:]}


def _row(text: str, key: str) -> list[str]:
    rows = [line for line in text.splitlines() if line.startswith(f"| `{key}` |")]
    assert len(rows) == 1, f"{key} has {len(rows)} rows"
    return [cell.strip() for cell in rows[0].strip("|").split(" | ")]


def test_every_field_of_every_section_has_its_row() -> None:
    sections = _sections(recipe_page())
    for key, field in keys_of(Recipe):
        model = section_of(field)
        for name, inner in flat_keys_of(model) if model else [(key, field)]:
            row = _row(sections[key if model else "Top level"], name)
            assert row[1:3] == [type_text(inner), default_text(inner)]
            assert inner.description, f"{key}.{name} has no description"
            assert row[3] == inner.description


def test_sections_go_by_the_names_a_recipe_uses() -> None:
    sections = _sections(recipe_page())
    assert "register" in sections
    assert "`harness.tasks`" in sections["evaluate"]
    assert "register_" not in recipe_page()


def test_the_committed_pages_are_current() -> None:
    assert main(["--check"]) == 0, "run python -m pipeline.apps.recipe_docs"
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == recipe_page()
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == catalogue_page()


def test_check_notices_a_missing_and_an_old_page(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    assert main(["--check", "--docs", str(docs)]) == 1
    assert not docs.exists()
    assert main(["--docs", str(docs)]) == 0
    assert main(["--check", "--docs", str(docs)]) == 0
    for page, word in (("recipe.md", "`rank`"), ("recipes.md", "quickstart")):
        text = (docs / page).read_text(encoding="utf-8")
        (docs / page).write_text(text.replace(word, "`r`"), encoding="utf-8")
        assert main(["--check", "--docs", str(docs)]) == 1
        (docs / page).write_text(text, encoding="utf-8")


class _Odd(BaseModel):
    whole: int = Field(3, ge=1)
    share: float | None = Field(None, gt=0, lt=1)
    upper: float = Field(0.01, ge=0, le=1)
    flag: bool = True
    choice: Literal["a", "b"] | None = None
    many: list[str] = Field(default_factory=list)
    one_or_many: StrList = Field(default_factory=lambda: ["x"])
    either: str | list[str] = "all"
    mapping: dict[str, int] = Field(default_factory=dict)
    place: Path = Path("here")
    name: str = Field(pattern="^a|b$")
    strange: bytes = b""


@pytest.mark.parametrize(
    ("field", "kind", "default"),
    [
        ("whole", "integer >= 1", "`3`"),
        ("share", "number > 0 and < 1", "unset"),
        ("upper", "number >= 0 and <= 1", "`0.01`"),
        ("flag", "true or false", "`true`"),
        ("choice", "one of `a`, `b`", "unset"),
        ("many", "list of text", "`[]`"),
        ("one_or_many", "list of text, or a single one", "`[x]`"),
        ("either", "text or list of text", "`all`"),
        ("mapping", "mapping of text to integer", "`{}`"),
        ("place", "path", "`here`"),
        ("name", "text matching `^a|b$`", "required"),
    ],
)
def test_types_and_defaults_are_readable(field: str, kind: str, default: str) -> None:
    info = _Odd.model_fields[field]
    assert (type_text(info), default_text(info)) == (kind, default)


def test_a_type_without_words_is_an_error() -> None:
    with pytest.raises(TypeError, match="bytes"):
        type_text(_Odd.model_fields["strange"])


def test_small_numbers_are_written_out() -> None:
    assert default_text(TrainSettings.model_fields["learning_rate"]) == "`0.0005`"
    assert default_text(DataSettings.model_fields["prompt_template"]) == "`'{prompt}'`"


def test_the_recipe_in_the_introduction_is_complete() -> None:
    assert "name: my-task\ndata:\n  train: my-task.jsonl\n" in recipe_page()
    assert parse_recipe({"name": "my-task", "data": {"train": "my-task.jsonl"}}, "page").data.train == ["my-task.jsonl"]


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"workers": 3, "batch_size": 2}},
        {"train": {"workers": 2, "min_workers": 3}},
        {"train": {"pack_tokens": 128}, "data": {"train": "a.jsonl", "max_tokens": 256}},
        {"train": {"patience": 2}},
        {"spectra": {"rank": 2}, "adapter": {"rank": 4, "truncation": "weight"}},
        {"evaluate": {"kind": "text", "choices": ["a", "b"]}},
        {"evaluate": {"kind": "choice", "choices": ["a"]}},
        {"evaluate": {"kind": "answer", "extract": True}},
        {"evaluate": {"kind": "choice", "metrics": ["nist"]}},
        {"evaluate": {"kind": "answer", "metric": "rouge_l"}},
        {"evaluate": {"kind": "choice", "choices": ["a", "b"], "metric": "exact_match"}},
        {"evaluate": {"kind": "answer", "metric": "accuracy"}},
        {"data": {"train": "a.jsonl", "prompt_template": "{prompt} {prompt}"}},
    ],
)
def test_the_rules_on_the_page_are_in_force(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        parse_recipe({"name": "n", "data": {"train": "a.jsonl"}, **change}, "page")
