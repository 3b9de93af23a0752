"""The two generated pages of documentation: `docs/recipe.md`, every key of a recipe, and `docs/recipes.md`, the shipped recipes.

    python -m pipeline.apps.recipe_docs [--check]

writes them. With `--check` nothing is written, and the exit code is 1 if a page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.methods import METHODS, AdapterSettings
from pipeline.config.recipe import Recipe, catalogue
from pipeline.config.section import NamedAbove, OneOf, StrList
from pipeline.config.settings import EvaluateSettings
from pipeline.data.forms import form_names
from pipeline.metrics.catalogue import METRICS, measured

DOCS = Path(__file__).resolve().parents[2] / "docs"

_INTRODUCTION = """\
# The recipe

<!-- Generated from the settings in pipeline/config/ by `python -m pipeline.apps.recipe_docs`; change the descriptions there. -->

A recipe is one YAML file that describes a run: `kasa run RECIPE.yaml`. This is a complete one, everything else has a
default:

```yaml
name: my-task
data:
  train: my-task.jsonl
```

Any key can be changed on the command line: `kasa run RECIPE.yaml train.epochs=2 "adapter.targets=[q_proj, v_proj]"`.
`kasa run RECIPE.yaml --dry-run` shows the resolved recipe and makes nothing in the workspace. An unknown key or a value out of range is
an error that names the file, the key and the nearest valid one. Paths are relative to the working directory.
"""

_RULES = """\
## Rules that span keys

- `train.workers` is at most `train.batch_size`, and `train.min_workers` at most `train.workers`.
- `train.pack_tokens` is at least `data.max_tokens`: the longest sample fits.
- `train.patience` needs `data.validation_rows`.
- `spectra.rank` is at least the number of triplets that the adapter drops.
- `evaluate.choices` and `evaluate.extract` belong to `evaluate.kind: choice`, and there are no choices or at least two
  different ones; `evaluate.metrics` belong to `kind: text`.
- `evaluate.metric` is one that is measured: {measured}.
- A new `base.head` decides `evaluate.kind` and `data.form`, and has no use for `data.prompt_template`,
  `data.chat_template`, `data.system_prompt`, `data.train_on_prompt` and `train.pack_tokens`. `train.head_learning_rate` and
  `data.labels` need one.
- `promotion.guards` names metrics that are measured, other than `evaluate.metric`.
- `data.prompt_template` contains `{{prompt}}` exactly once.
"""

_METHODS = """\
## Methods

What `adapter.method` can be. `kasa run` trains KaSA; `kasa compare` (docs/compare.md) trains any of them. The other settings
of `adapter` count for the methods that use them alone.

"""

_CATALOGUE = """\
# Recipes that come along

<!-- Generated from recipes/ by `python -m pipeline.apps.recipe_docs`. -->

`kasa run NAME`, `kasa plan NAME` and every other command take these names as they take files. `--dry-run` needs neither
network nor weights. Data and bases are fetched once; `data.train=FILE`, `data.heldout=FILE` and `base.model=FOLDER` name
local copies instead, which are read in the same way. To change one, copy its file from `recipes/`.

Settings are `published` (with the method's paper or code), `adapted` (another published work on the same task) or `ours`.
Published results are the authors' single runs, in %; none has been repeated here.
"""

_FAMILIES = {
    "recipes": "To start with",
    "commonsense": "Commonsense reasoning",
    "e2e": "Text from data",
    "glue": "GLUE",
    "instruct": "Instruction tuning",
}

_PLAIN = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
_LIST_FROM_TEXT = get_args(StrList)[1]
# The tables of names on floors that the settings cannot look into.
_TABLES = {"pipeline.data.forms": form_names}


def main(argv: Sequence[str] | None = None) -> int:
    """Write both pages, or only compare them with what the code says now. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m pipeline.apps.recipe_docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(argv)
    pages = {options.docs / "recipe.md": recipe_page(), options.docs / "recipes.md": catalogue_page()}
    outdated = [file for file, page in pages.items() if not file.exists() or file.read_text(encoding="utf-8") != page]
    for file in outdated:
        if options.check:
            print(f"{file} is out of date: run python -m pipeline.apps.recipe_docs", file=sys.stderr)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(pages[file], encoding="utf-8")
    return int(options.check and bool(outdated))


def catalogue_page() -> str:
    """The content of `docs/recipes.md`: a Markdown table for each family of shipped recipes."""
    parts = [_CATALOGUE]
    for family, named in groupby(catalogue(), key=lambda one: one.family):
        parts += [
            f"\n## {_FAMILIES[family]}\n\n",
            "| recipe | what | settings | trains on | published |\n",
            "|---|---|---|---|---|\n",
        ]
        notes: dict[str, None] = {}
        for one in named:
            about = one.recipe.about
            cells = (f"`{one.name}`", about.summary, about.settings, one.hardware, one.published)
            parts.append(f"| {' | '.join(map(_cell, cells))} |\n")
            notes |= {about.differences: None} if about.differences else {}
        parts += [f"\nNot as published: {note}.\n" for note in notes]
    return "".join(parts)


def recipe_page() -> str:
    """The content of `docs/recipe.md`: a Markdown table for each section of a recipe."""
    top = [(key, field) for key, field in keys_of(Recipe) if section_of(field) is None]
    parts = [_INTRODUCTION, f"## Top level\n\n{_table(top)}"]
    for key, field in keys_of(Recipe):
        if section := section_of(field):
            summary = (section.__doc__ or "").strip().partition("\n")[0]
            parts.append(f"## `{key}`\n\n{summary}\n\n{_table(flat_keys_of(section))}")
    return "\n".join([*parts, _METHODS + _methods_table(), _RULES.format(measured=_measured_rule())])


def _methods_table() -> str:
    rows = [("method", "what is trained", "settings it uses", "ZeRO stages"), ("---",) * 4]
    for spec in METHODS.values():
        used = [name for name in AdapterSettings.model_fields if name in spec.settings]
        largest = f"up to {spec.largest_stage}" if spec.largest_stage else "0"
        stages = f"{largest}: {spec.stage_reason}" if spec.stage_reason else largest
        rows.append((f"`{spec.name}`", spec.summary, ", ".join(f"`{name}`" for name in used), stages))
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def _measured_rule() -> str:
    """The metrics of each kind of evaluation; those that have to be asked for come with the setting that does."""
    asked = {"text": " and what `metrics` names", "choice": " and, with `extract`, `accuracy_generated`"}
    kinds = get_args(EvaluateSettings.model_fields["kind"].annotation)
    return "; ".join(f"for `kind: {kind}` {_names(measured(kind))}{asked.get(kind, '')}" for kind in kinds)


def _names(metrics: Sequence[str]) -> str:
    return ", ".join(
        f"`{name}`" + (f" (of {METRICS[name].classes} classes)" if METRICS[name].classes else "") for name in metrics
    )


def keys_of(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """The keys of a pydantic model as a recipe spells them (aliases count), with their fields."""
    return ((field.alias or name, field) for name, field in model.model_fields.items())


def flat_keys_of(section: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """The keys of a section. The keys of a nested block are spelled `block.key`."""
    for key, field in keys_of(section):
        if inner := section_of(field):
            yield from ((f"{key}.{name}", one) for name, one in flat_keys_of(inner))
        else:
            yield key, field


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The pydantic model of a key that holds a block of keys; None for a plain value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def type_text(field: FieldInfo) -> str:
    """A field's type and limits in words, such as `integer >= 1`."""
    words = _words(field.annotation)
    for mark in field.metadata:
        if isinstance(mark, OneOf | NamedAbove):
            words = _one_of(mark.names if isinstance(mark, OneOf) else _TABLES[mark.table]())
    if _LIST_FROM_TEXT in field.metadata:
        words += ", or a single one"
    limits = " and ".join(filter(None, map(_limit, field.metadata)))
    return f"{words} {limits}".strip()


def default_text(field: FieldInfo) -> str:
    """A field's default in YAML; `unset` for None."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "unset"
    plain = str(value) if isinstance(value, Path) else value
    # YAML ends a bare value with a document marker on a line of its own.
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`"


def _table(keys: Iterator[tuple[str, FieldInfo]] | list[tuple[str, FieldInfo]]) -> str:
    rows = [
        ("key", "type", "default", "description"),
        ("---",) * 4,
        *((f"`{key}`", type_text(field), default_text(field), field.description or "") for key, field in keys),
    ]
    return "".join(f"| {' | '.join(_cell(cell) for cell in row)} |\n" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _words(kind: Any) -> str:
    arguments = get_args(kind)
    match get_origin(kind):
        case None if kind in _PLAIN:
            return _PLAIN[kind]
        case origin if origin is Literal:
            return _one_of(arguments)
        case origin if origin is Annotated:
            return f"{_words(arguments[0])} {' '.join(filter(None, map(_limit, _marks(arguments[1:]))))}".strip()
        case origin if origin in (Union, UnionType):
            # That None is allowed shows in the default: unset.
            return " or ".join(_words(part) for part in arguments if part is not NoneType)
        case origin if origin is list:
            return f"list of {_words(arguments[0])}"
        case origin if origin is dict:
            return f"mapping of {_words(arguments[0])} to {_words(arguments[1])}"
    raise TypeError(f"no words for the type {kind}; add them to pipeline/apps/recipe_docs.py")


def _marks(annotations: Iterable[Any]) -> Iterator[Any]:
    for mark in annotations:
        yield from mark.metadata if isinstance(mark, FieldInfo) else [mark]


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(f"`{name}`" for name in names)


def _limit(limit: Any) -> str:
    match limit:
        case Ge(ge=bound):
            return f">= {bound}"
        case Gt(gt=bound):
            return f"> {bound}"
        case Le(le=bound):
            return f"<= {bound}"
        case Lt(lt=bound):
            return f"< {bound}"
        case MaxLen(max_length=bound):
            return f"of at most {bound} letters, digits, `_`, `.` and `-`"
    pattern = getattr(limit, "pattern", None)
    return f"matching `{pattern}`" if pattern else ""


if __name__ == "__main__":
    sys.exit(main())
