"""Nothing unknown or impossible in a recipe passes, and each error names file, key, value and what to do."""

from pathlib import Path

import pytest
import yaml

from pipeline.config.recipe import load_recipe, parse_recipe, recipe_values
from pipeline.core.errors import RecipeError
from tests.support import ROOT

TEXT = "name: tiny\ndata:\n  train: rows.jsonl\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_come_along_are_valid(path) -> None:
    load_recipe(path)


def test_resolved_values_are_a_recipe_again(file) -> None:
    recipe = load_recipe(file, ["train.workers=2", "register.model=other"])
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe_values(recipe))), "again") == recipe


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.learning_rate=1e-3", "train", "learning_rate", 1e-3),
        ("train.learning_rate=1.0e-3", "train", "learning_rate", 1e-3),
        ("train.max_steps=null", "train", "max_steps", None),
        ("adapter.targets=[q_proj, v_proj]", "adapter", "targets", ["q_proj", "v_proj"]),
        ("data.prompt_template=a={prompt}", "data", "prompt_template", "a={prompt}"),
        ("data.train=a.jsonl", "data", "train", ["a.jsonl"]),
        ("train.gpu=true", "train", "gpu", True),
    ],
)
def test_overrides(file, override, section, key, value) -> None:
    assert getattr(getattr(load_recipe(file, [override]), section), key) == value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rte=1", r"unknown key train\.learning_rte \(value 1\); did you mean learning_rate"),
        ("trian.workers=1", r"unknown key trian .*did you mean train\b"),
        ("adapter.rnak=4", r"unknown key adapter\.rnak .*rank"),
        ("train.workers=two", r"train\.workers: .*integer.* \(value 'two'\)"),
        ("train.workers=0", r"train\.workers: .*greater than or equal to 1 \(value 0\)"),
        ("train=3", r"recipe\.yaml: train: .*\(value 3\)"),
        ("train.precision=fp16", r"train\.precision: .*'auto', 'fp32' or 'bf16' \(value 'fp16'\)"),
        ("train.workers=20", r"train\.batch_size 16 leaves some of the 20 workers idle"),
        ("train.min_workers=2", r"train\.min_workers 2 is more than train\.workers 1"),
        ("spectra.rank=4", r"spectra\.rank 4 is smaller than the 8 triplets the adapter drops"),
        (
            "evaluate.metric=accuracy",
            r"metric accuracy is not measured here; choose one of bleu, chrf, exact_match, loss, perplexity, rouge_l",
        ),
        ("evaluate.choices=[a, b]", r"choices belong to kind: choice"),
        ("evaluate.extract=true", r"extract belongs to kind: choice"),
        ("evaluate={kind: loss, metrics: [bleu]}", r"metrics belong to kind: text"),
        ("evaluate={kind: choice, choices: [a]}", r"at least two different answers"),
        ("evaluate={kind: choice, choices: [a, ' ']}", r"choices must not be empty"),
        ("evaluate.metrics=[metor]", r"metrics: there is no 'metor' of generated text; did you mean meteor"),
        ("evaluate={kind: choice, metric: accuracy_generated}", r"accuracy_generated is not measured here"),
        (
            "promotion.guards={los: 0.1}",
            r"promotion\.guards\.los: no metric of that name is measured here; did you mean loss",
        ),
        (
            "promotion.guards={accuracy: 0.1}",
            r"promotion\.guards\.accuracy: no metric of that name is measured here; choose",
        ),
        (
            "promotion.guards={rouge_l: 1}",
            r"promotion\.guards\.rouge_l: rouge_l decides already; use promotion\.margin",
        ),
        ("promotion.guards={loss: -1}", r"promotion\.guards\.loss: the largest fall -1\.0 must be 0 or more"),
        ("promotion.guards={loss: .nan}", r"promotion\.guards\.loss: the largest fall nan must be 0 or more"),
        ("promotion.margin=-1", r"promotion\.margin: .*greater than or equal to 0"),
        ("data.prompt_template=no place", r"prompt_template must contain \{prompt\} exactly once"),
        ("name=a name", r"recipe\.yaml: name: .*\(value 'a name'\)"),
        ("train.workers", r"override 'train\.workers' must have the form section\.key=value"),
        ("=3", r"must have the form"),
        ("name.first=x", r"name is a value, not a section"),
    ],
)
def test_mistakes(file, override, says) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(file, [override])


def test_an_empty_section_can_be_filled_by_an_override(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT + "train:\n")
    assert load_recipe(path, ["train.workers=2"]).train.workers == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a mapping of sections, not NoneType"),
        ("- a\n", "must be a mapping of sections, not list"),
        ("a: [\n", "is not valid YAML"),
        ("name: tiny\n", "data is missing"),
        ("name: tiny\ndata: {}\n", r"data\.train is missing"),
    ],
)
def test_what_is_no_recipe(file, text, says) -> None:
    file.write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_recipe(file)


def test_no_file_and_no_text(tmp_path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")


def test_what_the_adapter_drops(recipe) -> None:
    assert (recipe().dropped_rank, recipe().spectra_rank) == (8, 8)
    none = recipe({"adapter.truncation": "none"})
    assert (none.dropped_rank, none.spectra_rank) == (0, 1)
    other = recipe({"adapter.truncation_rank": 3})
    assert (other.dropped_rank, other.spectra_rank) == (3, 3)
    assert recipe({"spectra.rank": 32}).spectra_rank == 32
