"""From the text of a recipe and the changes on the command line to plain values, and mistakes in them in words.

YAML here is what a recipe needs: mappings, lists, texts, numbers, `true`, `false` and `null`. `yes`, `no`, `on`, `off`,
dates and numbers with colons are texts, so that a list of answers or labels means what it says. A key written twice is an
error, since YAML would drop the first of them silently.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kasa.errors import nearest
from pipeline.core.errors import RecipeError, one_line

_TAG = "tag:yaml.org,2002:"
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")

# What PyYAML reads in an override that is no YAML, such as data.separator=||.
_NO_YAML = (yaml.scanner.ScannerError, yaml.parser.ParserError, yaml.reader.ReaderError, yaml.composer.ComposerError)

# Keys of other trainers (transformers, PEFT, TRL, LLaMA-Factory, Axolotl) and the recipe's key for the same thing.
_ELSEWHERE = {
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "max_grad_norm": "train.gradient_clipping",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_ratio": "train.warmup_share",
    "warmup_steps": "train.warmup_share",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.checkpoints_kept",
    "eval_steps": "train.validate_every",
    "num_gpus": "train.workers",
    "gpus": "train.workers",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "dtype": "train.precision",
    "torch_dtype": "train.precision",
    "packing": "train.pack_tokens",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "base_model": "base.model",
    "model_name": "base.model",
    "model_name_or_path": "base.model",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "test": "data.heldout",
    "eval": "data.heldout",
    "validation": "data.validation_rows",
    "val_set_size": "data.heldout_share",
    "cutoff_len": "data.max_tokens",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "template": "data.prompt_template",
    "system": "data.system_prompt",
    "output_dir": "workspace",
}

# What a single value in the place of a section is most likely meant for, by the kind of the value.
_INSTEAD_OF_SECTION: dict[str, tuple[tuple[type, str], ...]] = {
    "about": ((str, "about.summary"),),
    "base": ((str, "base.model"),),
    "data": ((str, "data.train"), (list, "data.train")),
    "train": ((str, "data.train"), (list, "data.train")),
    "adapter": ((str, "adapter.method"), (int, "adapter.rank"), (list, "adapter.targets")),
    "spectra": ((int, "spectra.rank"),),
    "evaluate.harness": ((str, "evaluate.harness.tasks"), (list, "evaluate.harness.tasks")),
    "promotion": ((int, "promotion.margin"), (float, "promotion.margin")),
    "register": ((str, "register.model"),),
}

_LONGEST_KEY = 100  # that is shown
_shown = reprlib.Repr()
_shown.maxstring, _shown.maxother, _shown.maxdict, _shown.maxlevel, _shown.maxlong = 120, 120, 6, 3, 40


class _Loader(yaml.SafeLoader):
    """Plain YAML: no dates, no tags of other kinds, no key twice."""

    yaml_constructors = {  # noqa: RUF012 - the library's own form
        **{f"{_TAG}{kind}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{kind}"] for kind in _KINDS},
        None: yaml.SafeLoader.yaml_constructors[None],
    }
    yaml_implicit_resolvers = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_shown.repr(key.value)} is written twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError):  # such as `!!int x`, or a number of thousands of digits
            kind = str(node.tag).removeprefix(_TAG)
            raise yaml.constructor.ConstructorError(
                None, None, f"{_shown.repr(node.value)} cannot be read as {kind}", node.start_mark
            ) from None


# All that `yaml.safe_dump` writes without quotes as a text is a text here too: these are among its own patterns.
for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0b[0-1_]+|0[0-7_]*|0x[0-9a-fA-F_]+|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"{_TAG}{_kind}", re.compile(rf"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )


def read_yaml(text: str) -> Any:
    """The values of a YAML text.

    Raises:
        yaml.YAMLError: it is none, a key is written twice, or a value cannot be read as what its tag says.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF"
        raise yaml.YAMLError(one_line(error)) from None


def read_values(path: Path) -> dict[str, Any]:
    """The values of a recipe's file.

    Raises:
        RecipeError: it cannot be read, or is no YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {one_line(error)}") from None
    if values is None:
        raise RecipeError(f"recipe {path} is empty; it needs at least `name` and `data.train`")
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} must be a mapping of sections such as `train:`, not {_kind_of(values)}")
    return values


def apply_override(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set one `section.key=value`, with a YAML value, and return the path of the key.

    Raises:
        RecipeError: it has not that form, or leads through something that is no section.
    """
    dotted, separator, raw = override.partition("=")
    if not separator or not all(dotted.split(".")):
        raise RecipeError(f"override {_shown.repr(override)} must have the form section.key=value")
    try:
        value = read_yaml(raw)
    except _NO_YAML:
        value = raw
    except yaml.YAMLError as error:
        raise RecipeError(f"override {_shown.repr(override)}: {one_line(error)}") from None
    *sections, key = dotted.split(".")
    block = values
    for section in sections:
        # A section that the file names but leaves empty is None.
        block[section] = dict(block[section]) if isinstance(block.get(section), dict) else block.get(section)
        if block[section] is None:
            block[section] = {}
        block = block[section]
        if not isinstance(block, dict):
            hint = _instead_of(section, block)
            raise RecipeError(f"override {_shown.repr(override)}: {section} is a value, not a section{hint}")
    block[key] = value
    return (*sections, key)


def explain(error: ValidationError, root: type[BaseModel], where: str, overrides: Collection[tuple[str, ...]]) -> str:
    """Up to five problems, one line each: where, the dotted key, what is wrong, the value, and what was perhaps meant.

    Args:
        root: the model that was validated.
        where: the recipe's file.
        overrides: the paths of the keys that the command line has set.
    """
    lines = []
    for problem in error.errors(include_url=False, include_context=True)[:5]:
        path = tuple(str(part) for part in problem["loc"])
        lines.append(f"{_blamed(path, where, overrides)}: {_in_words(problem, path, root)}")
    return "\n".join(dict.fromkeys(lines))


def _blamed(path: tuple[str, ...], where: str, overrides: Collection[tuple[str, ...]]) -> str:
    if any(path[: len(override)] == override for override in overrides):
        return "command line"
    within = [".".join(override)[:_LONGEST_KEY] for override in overrides if override[: len(path)] == path]
    return f"{where} with {', '.join(within)} of the command line" if within else where


def _in_words(problem: Any, path: tuple[str, ...], root: type[BaseModel]) -> str:
    kind, value = problem["type"], problem["input"]
    dotted, shown = ".".join(path)[:_LONGEST_KEY] or "recipe", _shown.repr(value)
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "model_type":
        return (
            f"{dotted}: a section with keys of its own belongs here, not "
            f"{'a list' if isinstance(value, list) else 'a single value'} (value {shown}){_instead_of(dotted, value)}"
        )
    if kind == "extra_forbidden":
        return f"unknown key {dotted} (value {shown}){_meant(path, root)}"
    if kind == "missing":
        return f"{dotted} is missing: {message.lower()}"
    if kind == "value_error" and isinstance(value, dict):
        return f"{dotted}: {message}"
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        message += "; write it in quotes"
    if kind == "literal_error" and isinstance(value, str):
        message += nearest(value, re.findall(r"'([^']*)'", str(problem["ctx"]["expected"])))
    return f"{dotted}: {message} (value {shown})"


def _instead_of(section: str, value: Any) -> str:
    key = next((key for kind, key in _INSTEAD_OF_SECTION.get(section, ()) if type(value) is kind), None)
    return f"; did you mean {key}: {_shown.repr(value)}?" if key else ""


def _meant(path: tuple[str, ...], root: type[BaseModel]) -> str:
    """The keys that an unknown one may stand for: what other programs call so, then equal names, then similar ones."""
    name = path[-1][:_LONGEST_KEY]
    keys = dotted_keys(root)
    if name in _ELSEWHERE:
        return f"; did you mean {_ELSEWHERE[name]}?"
    if same := [key for key in keys if key.rpartition(".")[2] == name]:
        return f"; did you mean {' or '.join(same)}?"
    beside = [key for key in keys if key.rpartition(".")[0] == ".".join(path[:-1])]
    return _similar(name, beside) or _similar(name, keys)


def _similar(name: str, keys: Iterable[str]) -> str:
    by_last: dict[str, list[str]] = {}
    for key in keys:
        by_last.setdefault(key.rpartition(".")[2], []).append(key)
    found = [key for last in difflib.get_close_matches(name, by_last, n=2, cutoff=0.6) for key in by_last[last]]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys of a model and its sections, dotted, as a recipe spells them."""
    found = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        found.append(key)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += dotted_keys(field.annotation, f"{key}.")
    return found


def _kind_of(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    return "a mapping" if isinstance(value, Mapping) else f"the single value {_shown.repr(value)}"
