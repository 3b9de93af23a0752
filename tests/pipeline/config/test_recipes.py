"""The recipes that come along: each is planned with no network and no weights, and is found by its name."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from kasa.errors import KasaError
from pipeline.cli.main import app
from pipeline.config.recipe import find_recipe, load_recipe, named_recipes
from pipeline.core.errors import RecipeError

NAMES = list(named_recipes())


@pytest.fixture(autouse=True)
def _nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no hub, and a network that fails the test when something asks for a host."""

    def refuse(host: object, *_: object, **__: object) -> None:
        raise AssertionError(f"the network was asked for {host}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KASA_CACHE", str(tmp_path.parent / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path.parent / "no-hub"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: refuse(address))


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_needs_neither_network_nor_weights(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", name, "--dry-run", "--json"])
    # What only this machine lacks, such as a GPU, is refused after the plan is shown.
    assert result.exception is None or isinstance(result.exception, KasaError), result.output
    plan = json.loads(result.stdout.splitlines()[-1])
    assert bool(plan["refused"]) == (result.exception is not None)
    assert plan["estimate"]["trainable_parameters"] > 0
    assert plan["estimate"]["memory"] is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["glue-roberta-base-cola", "e2e-gpt2-medium", "commonsense-llama3-8b"])
def test_its_comparison_is_planned_likewise(name: str, tmp_path: Path) -> None:
    methods = ["kasa", "lora", "pissa", "corda", "dora", "full"]
    arguments = ["compare", name, "--methods", ",".join(methods), "--dry-run", "--json", "train.deepspeed=gpu_zero2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, KasaError), result.output
    assert len(json.loads(result.stdout.splitlines()[-1])["trials"]) == 1 + 3 * len(methods)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is(name: str) -> None:
    about = load_recipe(Path(name)).about
    assert about.summary
    assert (about.settings == "ours") == (not about.published) or about.differences


def test_hello_is_ten_steps_of_the_demos_task() -> None:
    hello, demo = load_recipe(Path("hello")), load_recipe(Path("quickstart"))
    assert hello.data.train_rows == 10 * hello.train.batch_size * hello.train.epochs
    assert hello.base == demo.base
    for task in ("train", "prompt_template", "chat_template", "max_tokens"):
        assert getattr(hello.data, task) == getattr(demo.data, task)
    assert (hello.evaluate.kind, hello.evaluate.choices) == (demo.evaluate.kind, demo.evaluate.choices)


def test_a_file_of_ones_own_comes_before_a_name(tmp_path: Path) -> None:
    own = tmp_path / "quickstart"
    own.write_text("name: mine\ndata: {train: rows.jsonl}\n")
    assert load_recipe(Path("quickstart")).name == "mine"
    own.unlink()
    assert load_recipe(Path("quickstart")).name == "quickstart"


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"does not exist; .* did you mean quickstart\?"):
        find_recipe(Path("quickstrat"))


def test_the_catalogue_is_listed() -> None:
    result = CliRunner().invoke(app, ["recipes", "--json"])
    listed = json.loads(result.stdout.splitlines()[-1])
    assert [one["name"] for one in listed] == NAMES
    assert CliRunner().invoke(app, ["recipes"]).stdout.count("quickstart") == 1
