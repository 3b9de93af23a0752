"""Recipes with mistakes of all kinds, made by chance from a seed: nothing but a `KasaError` comes out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from kasa.errors import KasaError
from pipeline.config.deepspeed import complete_config, load_deepspeed_config
from pipeline.config.reading import dotted_keys
from pipeline.config.recipe import Recipe, load_recipe, named_recipes, recipe_values
from pipeline.data.forms import check_form
from pipeline.training.job import optimizer_steps

# Each is a value or a piece of text for some key; what YAML, pydantic or Python's own limits have trouble with.
VALUES = [
    "2024-99-99", "2024-01-01", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary '*'", "!!python/name:os.system ''",
    "!!set {a}", "!!omap [a: 1]", '!!int ""', ".inf", "-.inf", ".nan", "1e300", "1e-300", "-1", "0", "0.5", "9" * 5000,
    "9" * 400, "-" + "9" * 30, "1e-11", "''", '"\\ud800"', '"\\UFFFFFFFF"', '"\\0"', "[" * 400, "[" * 40 + "]" * 40, "{" * 40 + "}" * 40,
    "{a: 1, a: 2}", "? [a]\n: b", "*unknown", "&a [*a]", "&a {b: *a}", "<<: 3", "=", "~", "null", "yes", "[yes, no]", "[1, 2]", "[[]]",
    "[null]", "{}", "[]", "x" * 245, "x" * 70000, "../x", "team/tiny", "a'b", "a:b", "%TAG ! x", "@", "`", "|", ">", "- - -", "1:30:00",
    "0x", "0b", "+", "1_0", "re:(", "re:" + "(" * 200, "re:a{1,99999999999}", "~nobody/x", "/dev/null", "/", "\\u202e", "\x85", "\ufeff", "é", "😀",
]  # fmt: skip
# A key of each kind of value.
KINDS = ["train.seed", "train.learning_rate", "train.gpu", "train.deepspeed", "data.train", "data.columns", "data.separator",
         "adapter.targets", "evaluate.choices", "promotion.guards", "workspace", "register.model", "train"]  # fmt: skip
SHIPPED = {name: file.read_text(encoding="utf-8") for name, file in named_recipes().items()}
KEYS = [key for key in dotted_keys(Recipe) if "." in key] + [
    "name",
    "workspace",
    "nothing",
    "train.nothing",
    "data",
    "about",
]


def _text(rng: random.Random) -> str:
    """A shipped recipe's text with one to five changes: bytes, lines, values, keys."""
    lines = rng.choice(list(SHIPPED.values())).splitlines()
    for _ in range(rng.randint(1, 5)):
        place = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            lines.insert(place, lines[rng.randrange(len(lines))])
        elif kind == 1:
            del lines[place]
        elif kind == 2 and ":" in lines[place]:
            lines[place] = f"{lines[place].partition(':')[0]}: {rng.choice(VALUES)}"
        elif kind == 3:
            lines[place] = " " * rng.randrange(5) + lines[place].lstrip()
        elif kind == 4 and lines[place]:
            at = rng.randrange(len(lines[place]))
            lines[place] = lines[place][:at] + rng.choice("\t\0:{}[]&*!|>'\"%@`\x7f\ud800-") + lines[place][at + 1 :]
        elif kind == 5:
            lines[place] = rng.choice(VALUES)
        elif kind == 6:
            section, _, key = rng.choice(KEYS).rpartition(".")
            lines += [f"{section or 'train'}:", f"  {key}: {rng.choice(VALUES)}"]
        lines = lines or [""]
    return "\n".join(lines)


def _odd(rng: random.Random) -> Any:
    return rng.choice(
        [None, True, -1, 0, 10**4200, 2**63, 1e300, float("inf"), float("nan"), "", "\ud800", "\0", "x" * 300, [], {}, [None], [[]],
         {"a": {"b": None}}, {1: 2}, ["a", 1], {"stage": "auto"}, 0.5, "auto", b"x", (1,), {None: None}]
    )  # fmt: skip


def _override(rng: random.Random) -> str:
    odd = yaml.safe_dump(_odd(rng), default_flow_style=True).removesuffix("...\n").strip()
    return rng.choice(
        [
            f"{rng.choice(KEYS)}={rng.choice(VALUES)}",
            f"{rng.choice(KEYS)}={odd}",
            rng.choice(["=", ".", "a..b=1", "train.=1", "name", "\ud800=1", "train.epochs.x=1", f"{'a.' * 2000}b=1"]),
        ]
    )


def _read(file: Path, overrides: list[str]) -> None:
    """What a command does with a recipe before it looks at data, base or services."""
    recipe = load_recipe(file, overrides)
    check_form(recipe.data)
    complete_config(load_deepspeed_config(recipe.train.deepspeed), recipe.train)
    assert optimizer_steps(recipe.train, 1) >= 1
    assert str(recipe.workspace)
    text = yaml.safe_dump(recipe_values(recipe), allow_unicode=True)
    file.write_text(text, encoding="utf-8")
    assert load_recipe(file) == recipe


def _tried(folder: Path, seeds: range) -> Iterator[tuple[int, str]]:
    file = folder / "recipe.yaml"
    for seed in seeds:
        rng = random.Random(seed)
        file.write_bytes(_text(rng).encode("utf-8", "surrogatepass" if rng.random() < 0.1 else "replace"))
        overrides = [_override(rng) for _ in range(rng.choice([0, 0, 1, 2]))]
        try:
            _read(file, overrides)
        except KasaError as error:
            if len(str(error)) > 4000 or "\n\n" in str(error):
                yield seed, f"an error of {len(str(error))} characters"
        except Exception as error:
            yield seed, f"{type(error).__name__}: {str(error)[:200]} {overrides!r:.300}"


def test_a_mutated_recipe_is_read_or_refused(tmp_path) -> None:
    assert list(_tried(tmp_path, range(100))) == []


@pytest.mark.soak
def test_many_mutated_recipes_are_read_or_refused(tmp_path) -> None:
    assert list(_tried(tmp_path, range(100, 2100))) == []


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_every_hard_value_in_every_kind_of_key(value, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    for key in KINDS:
        file.write_text("name: tiny\ndata: {train: rows.jsonl}\n", encoding="utf-8")
        with suppress(KasaError):
            _read(file, [f"{key}={value}"])
