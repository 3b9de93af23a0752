"""Mistakes and damage, made by a user at the command line: each must end in the right answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.core import Measurement, Setting, check
from tests.support.processes import start_kasa
from tests.support.tiny_inputs import write_tiny_inputs

# The longest that a refusal may take, on a busy machine too, and the longest that a whole run may.
REFUSAL_S, RUN_S = 60.0, 600.0
_DRY = ("run", "recipe.yaml", "--dry-run")
_RUN = ("run", "recipe.yaml")


@dataclass(frozen=True)
class Mistake:
    """A command and the right answer to it.

    Attributes:
        name: what is wrong, in words.
        command: the arguments of `kasa`.
        says: what the answer must name, in any order.
        code: the exit code.
        prepare: what is done to the folder with base, rows and recipe before.
        environment: variables of the command.
        never: what must not be shown.
        limit_s: the longest that the answer may take.
    """

    name: str
    command: tuple[str, ...]
    says: tuple[str, ...] = ()
    code: int = 2
    prepare: Callable[[Path], object] = lambda folder: None
    environment: Mapping[str, str] = field(default_factory=dict)
    never: tuple[str, ...] = ()
    limit_s: float = REFUSAL_S


def dry(name: str, setting: str, *says: str, code: int = 2, **options: Any) -> Mistake:
    """A setting on the command line of a dry run."""
    return Mistake(name, (*_DRY, setting), says, code, **options)


def written(name: str, text: str, *says: str, code: int = 2) -> Mistake:
    """Lines added to the recipe."""
    return Mistake(name, _DRY, says, code, prepare=lambda folder: _append(folder / "recipe.yaml", text))


def rows(name: str, content: str, *says: str) -> Mistake:
    """Other rows than the recipe's."""
    return Mistake(name, _RUN, says, prepare=lambda folder: (folder / "rows.jsonl").write_text(content))


def _append(file: Path, text: str) -> None:
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")


def _without(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in (folder / "base").glob(pattern):
            file.unlink()


def _change_config(folder: Path, **values: Any) -> None:
    file = folder / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def _drop_weights(folder: Path, *names: str) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "base" / "model.safetensors"
    kept = {name: value.clone() for name, value in load_file(file).items() if name not in names}
    save_file(kept, file, metadata={"format": "pt"})


_LAYER = "model.layers.1.mlp.down_proj.weight"

MISTAKES = (
    # What a recipe says.
    written("a key twice", "name: again\n", "name", "twice"),
    written("an empty section", "promotion:\n", code=0),
    written("a date that is none", "about: {summary: 2024-99-99}\n", code=0),
    written("a tag that is none", "seed: !!int x\n", "recipe.yaml"),
    written("deep nesting", f"about: {'[' * 3000}\n", "recipe.yaml"),
    Mistake("an empty recipe", _DRY, ("recipe.yaml",), prepare=lambda folder: (folder / "recipe.yaml").write_text("")),
    Mistake(
        "bytes that are no text", _DRY, ("recipe.yaml",), prepare=lambda f: (f / "recipe.yaml").write_bytes(b"\xff")
    ),
    dry("a rate beyond reason", "train.learning_rate=1e300", "train.learning_rate"),
    dry("an infinite rate", "train.learning_rate=.inf", "train.learning_rate"),
    dry("no number at all", "train.weight_decay=.nan", "train.weight_decay"),
    dry("a negative seed", "train.seed=-1", "train.seed"),
    dry("no epoch", "train.epochs=1e-11", "train.epochs"),
    dry("a wait without end", "train.collective_timeout_s=.inf", "train.collective_timeout_s"),
    dry("a name of 245 letters", f"name={'x' * 245}", "name"),
    dry("a registry name with a slash", "register.model=team/tiny", "register.model", "/"),
    dry("a registry name that leaves", "register.model=../x", "register.model"),
    dry("a registry name with a quote", 'register.model="ti\'ny"', "register.model"),
    dry("an abbreviation", "train.lr=1", "train.lr", "learning_rate"),
    dry("a key of another section", "epochs=1", "train.epochs"),
    dry("a letter short", "data.prmpt_template=x", "prompt_template"),
    dry("an unknown method", "adapter.method=lorra", "lora"),
    dry("a separator of no letters", 'data.separator=""', "data.separator"),
    dry("choices that YAML takes for booleans", "data.columns={choices: [yes, no]}", "columns"),
    Mistake(
        "a DeepSpeed file with auto",
        (*_DRY, "train.deepspeed=ds.json"),
        ("ds.json", "reduce_bucket_size"),
        prepare=lambda f: (f / "ds.json").write_text(
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}'
        ),
    ),
    # Places.
    Mistake("a workspace that is a file", (*_DRY, "workspace=rows.jsonl"), ("rows.jsonl",)),
    Mistake("a workspace nobody may make", (*_RUN, "workspace=/proc/kasa"), ("/proc/kasa",)),
    Mistake("the option in place of the setting", (*_DRY, "--workspace", "elsewhere"), ("elsewhere",), code=0),
    dry("no such base", "base.model=./bsae", "./bsae"),
    dry("a name that can be no hub id", "base.model=a/b/c", "base.model"),
    dry("no such data", "data.train=rows.josnl", "rows.josnl"),
    dry("an address without a host", "data.train=https:///rows.jsonl", "https:///rows.jsonl"),
    # Bases.
    Mistake("no weights", _DRY, ("base", "weights"), prepare=lambda f: _without(f, "*.safetensors")),
    Mistake("no tokenizer", _DRY, ("tokenizer",), prepare=lambda f: _without(f, "tokenizer*", "vocab*", "merges*")),
    Mistake("no configuration", _DRY, ("config.json",), prepare=lambda f: _without(f, "config.json")),
    Mistake("a weight is missing", _DRY, (_LAYER,), prepare=lambda f: _drop_weights(f, _LAYER)),
    Mistake("the head is missing", _DRY, ("lm_head.weight",), prepare=lambda f: _drop_weights(f, "lm_head.weight")),
    Mistake("layers left over", _DRY, ("model.layers.1",), prepare=lambda f: _change_config(f, num_hidden_layers=1)),
    Mistake("other sizes", _DRY, ("mlp",), prepare=lambda f: _change_config(f, intermediate_size=128)),
    Mistake("tokens without embedding", _RUN, ("token",), prepare=lambda f: _shrink_embedding(f, 200), limit_s=RUN_S),
    # Data.
    rows("no rows", "", "rows.jsonl"),
    rows("a form that is none", '{"q": "a", "r": "b"}\n', "rows.jsonl"),
    rows("no JSON", "prompt,completion\na,b\n", "rows.jsonl:1"),
    dry("columns that map to nothing", "data.columns={prompt: nothing}", "nothing"),
    # Machine and services.
    dry("more workers than cores", "train.workers=512", "train.workers"),
    dry("a GPU that is not there", "train.gpu=true", "GPU"),
    dry("METEOR without Java", "evaluate.metrics=[meteor]", "Java", environment={"PATH": "/nowhere"}),
    dry("no MLflow there", "train.seed=1", "127.0.0.1:9", environment={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}),
    dry("no Ray there", "train.seed=1", "127.0.0.1:9", environment={"RAY_ADDRESS": "127.0.0.1:9"}),
    Mistake("a silent Ray", _RUN, ("10.255.255.1",), environment={"RAY_ADDRESS": "10.255.255.1:1"}, limit_s=45.0),
    Mistake(
        "a password in an address",
        _DRY,
        ("127.0.0.1:9",),
        environment={"MLFLOW_TRACKING_URI": "http://alice:hunter2@127.0.0.1:9"},
        never=("hunter2",),
    ),
    dry(
        "a token in an address", "data.train=https://host.invalid/rows.jsonl?token=hunter2", code=0, never=("hunter2",)
    ),
    # Other commands.
    Mistake("a setting for a prompt", ("generate", "models:/tiny@champion", "workspace=w"), ("--workspace",)),
    Mistake("no such adapter", ("generate", "./nothing", "count"), ("./nothing",)),
    Mistake("a registry without the model", ("generate", "models:/tiny@champion", "count"), ("--workspace",)),
    Mistake("an export to nowhere", ("export", "base", "/proc/x/y", "--format", "lora"), ("base",)),
    Mistake("the version", ("--version",), ("kasa 0.",), code=0),
    Mistake("the recipes, piped", ("recipes",), ("quickstart",), code=0),
)


def _shrink_embedding(folder: Path, tokens: int) -> None:
    """Leave embeddings for the first tokens only, in weights and configuration alike."""
    from safetensors.torch import load_file, save_file

    file = folder / "base" / "model.safetensors"
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    kept = {name: value[:tokens].clone() if name in tables else value for name, value in load_file(file).items()}
    save_file(kept, file, metadata={"format": "pt"})
    _change_config(folder, vocab_size=tokens)


@check(bar=0, direction="at most", unit="wrong answers")
def faults(setting: Setting) -> Measurement:
    """Mistakes at the command line and damage: answers that are not exit code, one clear error and what it must name."""
    template = setting.scratch / "template"
    write_tiny_inputs(template)
    wrong: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for number, mistake in enumerate(MISTAKES):
        folder = setting.scratch / f"fault-{number}"
        shutil.copytree(template, folder)
        mistake.prepare(folder)
        flaws, seconds[mistake.name] = _answer(mistake, folder)
        if flaws:
            wrong[mistake.name] = flaws
        shutil.rmtree(folder)
    details = {"commands": len(MISTAKES), "wrong": wrong, "slowest_s": max(seconds.values()), "seconds": seconds}
    return Measurement(len(wrong), details, flaws=tuple(f"{name}: {'; '.join(why)}" for name, why in wrong.items()))


def _answer(mistake: Mistake, folder: Path) -> tuple[list[str], float]:
    """What is wrong with the answer to a mistake, and how long it took."""
    before = set(os.listdir(folder))
    began = time.monotonic()
    process = start_kasa(mistake.command, folder, mistake.environment, is_cold=True)
    try:
        out, said = process.communicate(timeout=mistake.limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return [f"no answer within {mistake.limit_s:g} s"], mistake.limit_s
    took, everything = time.monotonic() - began, out + said
    flaws = [f"exit code {process.returncode}, not {mistake.code}"] if process.returncode != mistake.code else []
    flaws += [f"does not name {word}" for word in mistake.says if word not in everything]
    flaws += [f"shows {word}" for word in (*mistake.never, "Traceback (most recent call last)") if word in everything]
    if mistake.code and "error:" not in said:
        flaws.append("says no error")
    if mistake.command[-1] == "--dry-run" and set(os.listdir(folder)) != before:
        flaws.append("left files behind")
    return [*flaws, *([said.strip()[-400:]] if flaws else [])], took
