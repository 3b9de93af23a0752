"""What is checked before a recipe is sent."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kasa.errors import KasaError
from pipeline.apps.job_package import check_inputs
from pipeline.apps.submit import passed_environment
from pipeline.cli.main import app
from pipeline.config.recipe import load_recipe
from pipeline.core.errors import JobError
from pipeline.run.preflight import check_before_work
from tests.support.tiny_inputs import write_tiny_inputs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "work"
    folder.mkdir()
    write_tiny_inputs(folder)
    write_tiny_inputs(folder.parent)
    return folder


@pytest.fixture(autouse=True)
def _there(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)


def check(tiny: Path, *overrides: str) -> list[str]:
    recipe = load_recipe(Path("recipe.yaml"), ["workspace=/shared/kasa", *overrides])
    check_before_work(recipe, elsewhere=True)
    return [path.relative_to(tiny).as_posix() for path in check_inputs(recipe, Path("recipe.yaml"), tiny)]


def test_the_recipe_and_what_it_names_by_relative_path_go_along(tiny: Path) -> None:
    assert check(tiny) == ["recipe.yaml", "rows.jsonl", "base"]
    assert check(tiny, "data.train=*.jsonl", "data.calibration=./rows.jsonl") == [
        "recipe.yaml",
        *["rows.jsonl"] * 2,
        "base",
    ]
    (tiny / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert check(tiny, "train.deepspeed=mine.json")[-1] == "mine.json"


@pytest.mark.parametrize(
    "elsewhere", ["/only/there/rows.jsonl", "hub:owner/name", "embedded:movie-reviews", "~/rows.jsonl"]
)
def test_what_lies_elsewhere_is_left_to_the_job(tiny: Path, elsewhere: str) -> None:
    assert check(tiny, f"data.train={elsewhere}") == ["recipe.yaml", "base"]
    assert check(tiny, "base.model=/only/there/base") == ["recipe.yaml", "rows.jsonl"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workspace=workspace", "name a folder on storage that all nodes share with workspace="),
        ("data.train=row.jsonl", "did you mean rows.jsonl?"),
        ("data.train=../rows.jsonl", r"data.train ../rows.jsonl lies outside the working directory"),
        ("base.model=../base", r"base.model ../base lies outside the working directory"),
        ("base.model=./bases", "neither a folder nor a hub id"),
        ("base.model=embedded:smollm", "is not embedded"),
        ("data.train=embedded:movies", "is not embedded"),
        ("train.deepspeed=cpu_zero9", "is no name in deepspeed_configs"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(tiny: Path, override: str, message: str) -> None:
    with pytest.raises(KasaError, match=message):
        check(tiny, override)


def test_a_recipe_outside_is_refused(tiny: Path) -> None:
    recipe = load_recipe(Path("recipe.yaml"), ["workspace=/shared/kasa"])
    with pytest.raises(JobError, match="the recipe lies outside the working directory"):
        check_inputs(recipe, Path("../recipe.yaml"), tiny)
    assert check_inputs(recipe, tiny / "recipe.yaml", tiny)[0] == tiny / "recipe.yaml"


def test_a_url_is_a_workspace(tiny: Path) -> None:
    assert check(tiny, "workspace=s3://bucket/kasa")[0] == "recipe.yaml"


def test_the_environment_that_is_passed_on() -> None:
    here = {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "HF_TOKEN": "t", "HOME": "/root", "MINE": "1"}
    assert passed_environment(here, []) == {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "HF_TOKEN": "t"}
    assert passed_environment(here, ["MINE", "OTHER=a=b", "HF_TOKEN="]) == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000", "HF_TOKEN": "", "MINE": "1", "OTHER": "a=b",
    }  # fmt: skip
    with pytest.raises(JobError, match="--env MINNE is not set here; did you mean MINE"):
        passed_environment(here, ["MINNE"])


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["submit", *arguments])


def test_the_command_looks_at_the_recipe_before_the_address(tiny: Path) -> None:
    values = yaml.safe_load(Path("recipe.yaml").read_text()) | {"trian": {}}
    Path("wrong.yaml").write_text(yaml.safe_dump(values))
    assert "unknown key trian" in str(command("wrong.yaml").exception)
    assert "--address http://HEAD:8265" in str(command("recipe.yaml", "workspace=/shared/kasa").exception)


@pytest.mark.parametrize(
    ("address", "message"),
    [("10.0.0.1:6379", "must be that of Ray's dashboard"), ("http://127.0.0.1:9", "no Ray dashboard answers at")],
)
def test_an_address_without_a_dashboard(tiny: Path, address: str, message: str) -> None:
    assert message in str(command("recipe.yaml", "workspace=/shared/kasa", "--address", address).exception)
