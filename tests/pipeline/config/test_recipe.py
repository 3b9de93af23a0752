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
        ("train.learning_rte=1", r"unknown key train\.learning_rte \(value 1\); did you mean train\.learning_rate"),
        ("trian.workers=1", r"unknown key trian .*did you mean train\b"),
        ("adapter.rnak=4", r"unknown key adapter\.rnak .*rank"),
        ("train.workers=two", r"train\.workers: .*integer.* \(value 'two'\)"),
        ("train.workers=0", r"train\.workers: .*greater than or equal to 1 \(value 0\)"),
        ("train=3", r"command line: train: a section with keys .*\(value 3\)$"),
        (
            "base=./base",
            r"base: a section .* not a single value \(value './base'\); did you mean base\.model: './base'\?",
        ),
        ("data=rows.jsonl", r"did you mean data\.train: 'rows\.jsonl'\?"),
        ("data=[a.jsonl]", r"data: .* not a list .*; did you mean data\.train: \['a\.jsonl'\]\?"),
        ("train=rows.jsonl", r"did you mean data\.train: 'rows\.jsonl'\?"),
        ("adapter=8", r"did you mean adapter\.rank: 8\?"),
        ("adapter=lora", r"did you mean adapter\.method: 'lora'\?"),
        ("adapter=[q_proj]", r"did you mean adapter\.targets: \['q_proj'\]\?"),
        ("spectra=8", r"did you mean spectra\.rank: 8\?"),
        ("promotion=0.5", r"did you mean promotion\.margin: 0\.5\?"),
        ("register=tiny", r"did you mean register\.model: 'tiny'\?"),
        ("evaluate=choice", r"evaluate: a section with keys .*\(value 'choice'\)$"),
        ("evaluate.harness=arc_easy", r"did you mean evaluate\.harness\.tasks: 'arc_easy'\?"),
        ("adapter.targets=[]", r"adapter\.targets: no module is named; leave the key out"),
        (
            "train.precision=fp16",
            r"train\.precision: .*'auto', 'fp32' or 'bf16'; did you mean bf16 or fp32\? \(value 'fp16'\)",
        ),
        ("train.workers=20", r"train\.batch_size 16 leaves some of the 20 workers idle"),
        ("train.min_workers=2", r"train\.min_workers 2 is more than train\.workers 1"),
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
        ("promotion.guards={loss: .nan}", r"promotion\.guards\.loss: .*finite number"),
        ("promotion.margin=-1", r"promotion\.margin: .*greater than or equal to 0"),
        ("data.prompt_template=no place", r"prompt_template must contain \{prompt\} exactly once"),
        ("name=a name", r"command line: name: .*\(value 'a name'\)"),
        ("train.lr=1", r"command line: unknown key train\.lr \(value 1\); did you mean train\.learning_rate\?"),
        ("epochs=1", r"unknown key epochs \(value 1\); did you mean train\.epochs\?"),
        ("lora_r=1", r"did you mean adapter\.rank\?"),
        ("batch_size=1", r"did you mean train\.batch_size or evaluate\.batch_size\?"),
        ("prmpt_template=x", r"did you mean data\.prompt_template"),
        ("base.head=classifcation", r"did you mean classification\?"),
        ("train={workers: 1, workers: 2}", r"override .*the key 'workers' is written twice"),
        ("train.learning_rate=1e300", r"train\.learning_rate: .*less than or equal to 1000000"),
        ("train.learning_rate=.inf", r"train\.learning_rate: .*finite number"),
        ("train.learning_rate=inf", r"train\.learning_rate: .*finite number"),
        ("adapter.alpha=1e300", r"adapter\.alpha: the number must be at most 1e\+15"),
        ("adapter.alpha=.nan", r"adapter\.alpha: .*finite number"),
        ("promotion.guards={loss: .inf}", r"promotion\.guards\.loss: .*finite number"),
        ("about.published={accuracy: .inf}", r"about\.published\.accuracy: .*finite number"),
        (f"train.max_steps={'9' * 400}", r"train\.max_steps: .*at most 1e\+15 .*value 9999.*\.\.\."),
        ("train.seed=-1", r"train\.seed: .*greater than or equal to 0"),
        ("data.split_seed=4294967296", r"data\.split_seed: .*less than or equal to 4294967295"),
        ("train.epochs=1e-11", r"train\.epochs: .*greater than or equal to 0\.001"),
        ("train.collective_timeout_s=.inf", r"train\.collective_timeout_s: .*finite number"),
        ("train.collective_timeout_s=1e9", r"train\.collective_timeout_s: .*less than or equal to 604800"),
        ("train.cpus_per_worker=0.00001", r"train\.cpus_per_worker: .*greater than or equal to 0\.0001"),
        ("train.cpus_per_worker=0.33333", r"Ray counts cores in steps of 0\.0001"),
        (f"name={'x' * 245}", r"name: .*at most 100 characters"),
        ("register.model=team/tiny", r"register\.model: a name consists of"),
        ("register.model=it's", r"register\.model: a name consists of"),
        ("register.model=../x", r"register\.model: a name consists of"),
        (f"register.model={'x' * 300}", r"register\.model: .*at most 100 characters"),
        ('data.separator=""', r"data\.separator: the text is empty; leave the key out"),
        ('workspace=""', r"workspace: the text is empty"),
        ("data.train=[]", r"data\.train: .*at least 1 item"),
        ('data.train=["a.jsonl", ""]', r"data\.train: the text is empty"),
        ('data.train="a\\0b"', r"data\.train: .*NUL"),
        ("evaluate={kind: choice, choices: [true, false]}", r"choices\.0: .*; write it in quotes"),
        ("adapter.targets=re:(", r"adapter\.targets: no regular expression: "),
        ("train.workers", r"override 'train\.workers' must have the form section\.key=value"),
        ("=3", r"must have the form"),
        ("name.first=x", r"name is a value, not a section"),
    ],
)
def test_mistakes(file, override, says) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(file, [override])


def test_words_that_yaml_takes_for_truth_values_or_dates_are_words(file) -> None:
    recipe = load_recipe(file, ["evaluate={kind: choice, choices: [yes, no]}", "train.gpu=yes", "data.separator=="])
    assert recipe.evaluate.choices == ["yes", "no"]
    assert recipe.train.gpu is True
    assert recipe.data.separator == "="
    file.write_text(f"{TEXT}  labels: [2024-01-01, on, 1:30]\nbase: {{head: classification}}\n")
    assert load_recipe(file).data.labels == ["2024-01-01", "on", "1:30"]
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe_values(recipe))), "again") == recipe


def test_the_one_who_wrote_it_is_blamed(file) -> None:
    file.write_text(TEXT + "train: {lr: 1}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["adapter.rnak=1", "train.workers=20"])
    told = dict(line.split(": unknown key ") for line in str(caught.value).splitlines())
    assert [key.split()[0] for key in told.values()] == ["adapter.rnak", "train.lr"]
    assert list(told) == ["command line", str(file)]
    file.write_text(TEXT)
    with pytest.raises(RecipeError, match=r"recipe\.yaml with train\.workers of the command line: .*workers idle"):
        load_recipe(file, ["train.workers=20"])


def test_a_home_folder_is_found(file, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(file, ["workspace=~/kasa"]).workspace == tmp_path / "kasa"
    assert (
        load_recipe(file, ["evaluate.harness={include: ~/tasks, tasks: [own]}"]).evaluate.harness.include
        == f"{tmp_path}/tasks"
    )
    assert load_recipe(file, ["workspace=~nobody-here/kasa"]).workspace == Path("~nobody-here/kasa")


def test_an_error_stays_short_whatever_was_written(file) -> None:
    file.write_text(
        TEXT
        + "x: &a [1, 2, 3, 4, 5, 6]\n"
        + "".join(f"x{n}: &{n} [*{n - 1 if n else 'a'}, *a, *a, *a]\n" for n in range(30))
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [f"train.{'k' * 9999}={'v' * 9999}"])
    assert len(str(caught.value)) < 2000


def test_an_empty_section_can_be_filled_by_an_override(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT + "train:\n")
    assert load_recipe(path, []).train.workers == 1
    assert load_recipe(path, ["train.workers=2"]).train.workers == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"recipe\.yaml is empty; it needs"),
        ("# nothing yet\n", r"recipe\.yaml is empty"),
        ("- a\n", "must be a mapping of sections such as `train:`, not a list"),
        ("hello\n", "not the single value 'hello'"),
        ("a: [\n", "is not valid YAML"),
        (f"{TEXT}train: {{seed: 1}}\nname: other\n", "the key 'name' is written twice.* line 5"),
        (f"{TEXT}train:\n  seed: 1\n  seed: 2\n", "the key 'seed' is written twice.* line 6"),
        (f"{TEXT}  form: !!int x\n", "'x' cannot be read as int.* line 4"),
        (f"{TEXT}  form: !!python/name:os.system ''\n", "could not determine a constructor"),
        (f"{TEXT}train: {{max_steps: {'9' * 5000}}}\n", "cannot be read as int"),
        (f"{TEXT}  form: {'[' * 1000}\n", "nested too deeply"),
        (f'{TEXT}  form: "\\UFFFFFFFF"\n', "is not valid YAML"),
        (f'{TEXT}  form: "\\ud800"\n', "data.form: the text holds a character that cannot be written"),
        (
            f"{TEXT}  form: 2024-99-99\n  columns: {{a: 2024-01-01}}\n  labels: [1, 2]\n",
            "data.labels.0: .*; write it in quotes",
        ),
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


def test_too_few_triplets_for_what_is_dropped(recipe) -> None:
    with pytest.raises(RecipeError, match=r"spectra\.rank 4 is smaller than the 8 triplets the adapter drops"):
        recipe({"spectra.rank": 4})


def test_what_the_adapter_drops(recipe) -> None:
    assert (recipe().dropped_rank, recipe().spectra_rank) == (8, 8)
    none = recipe({"adapter.truncation": "none"})
    assert (none.dropped_rank, none.spectra_rank) == (0, 0)
    other = recipe({"adapter.truncation_rank": 3})
    assert (other.dropped_rank, other.spectra_rank) == (3, 3)
    assert recipe({"spectra.rank": 32}).spectra_rank == 32
