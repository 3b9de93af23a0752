"""Which change of a recipe recomputes which stage; which stages a run, a trial and the base alone need, and in what order."""

import json

import pytest

from kasa.targets import Target
from pipeline.config.recipe import Recipe
from pipeline.run import graph as keys
from pipeline.run.dependencies import KeyInputs

TARGETS = [Target("q", 8, 8), Target("v", 4, 8)]
ALL = set(keys.STAGES)


def chain(recipe: Recipe, sources: str = "s", base: str = "b", targets=TARGETS, registry: str = "r") -> dict[str, str]:
    """The key of each stage of a run."""
    made = keys.stage_keys(KeyInputs(recipe, base, sources, targets, registry))
    return {stage: key.key for stage, key in made.items()}


def named(value: object) -> str:
    """A test id that is the same in every process."""
    return " ".join(sorted(value)) or "nothing" if isinstance(value, set) else str(value)


FROM_TRAIN = {"train", "evaluate", "register"}
WEIGHT = {"adapter.truncation": "weight"}


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"train.learning_rate": 1e-3}, FROM_TRAIN),
        ({"train.seed": 1}, FROM_TRAIN),
        ({"train.batch_size": 8}, FROM_TRAIN),
        ({"train.epochs": 2}, FROM_TRAIN),
        ({"train.precision": "fp32"}, ALL - {"prepare"}),
        ({"adapter.truncation": "weight"}, ALL - {"prepare"}),
        ({"adapter.truncation_rank": 4, "spectra.rank": 8}, ALL - {"prepare", "spectra"}),
        ({"spectra.calibration_tokens": 100}, ALL - {"prepare"}),
        ({"spectra.audit_tokens": 100}, {"audit"}),
        ({"spectra.warn_above": 1.0}, set()),
        ({"adapter.alpha": 8}, FROM_TRAIN),
        ({"adapter.regulariser": "paper"}, FROM_TRAIN),
        ({"train.start": "champion"}, set()),
        ({"train.workers": 2}, set()),
        ({"train.deepspeed": "cpu_zero3"}, set()),
        ({"train.micro_batch_size": 4}, set()),
        ({"train.gpu": True}, set()),
        ({"train.checkpoint_every": 7}, set()),
        ({"train.max_failures": 0}, set()),
        ({"train.gradient_checkpointing": True}, set()),
        ({"evaluate.workers": 2}, set()),
        ({"evaluate.batch_size": 2}, set()),
        ({"workspace": "elsewhere"}, set()),
        ({"data.train": "moved.jsonl"}, set()),
        ({"adapter.rank": 4, "spectra.rank": 8}, ALL - {"prepare", "spectra"}),
        ({"adapter.rank": 4}, ALL - {"prepare"}),
        ({"spectra.rank": 16}, ALL - {"prepare"}),
        ({"data.prompt_template": "Q: {prompt}"}, ALL),
        ({"data.max_tokens": 64}, ALL),
        ({"data.split_seed": 1}, ALL),
        ({"evaluate.max_new_tokens": 8}, {"evaluate", "register"}),
        ({"evaluate.metric": "loss"}, {"register"}),
        ({"register.model": "other"}, {"register"}),
        ({"promotion.margin": 0.1}, {"register"}),
        ({"promotion.guards": {"loss": 0.1}}, {"register"}),
    ],
    ids=named,
)
def test_a_change_makes_what_depends_on_it_anew(recipe, changes, stages) -> None:
    before, after = chain(recipe()), chain(recipe(changes))
    assert {stage for stage in before if before[stage] != after[stage]} == stages


@pytest.mark.parametrize(
    ("inputs", "stages"),
    [
        ({"sources": "other rows"}, ALL),
        ({"base": "other weights"}, ALL),
        ({"targets": TARGETS[:1]}, ALL - {"prepare"}),
        ({"registry": "other"}, {"register"}),
    ],
    ids=named,
)
def test_a_change_of_an_input_too(recipe, inputs, stages) -> None:
    before, after = chain(recipe()), chain(recipe(), **inputs)
    assert {stage for stage in before if before[stage] != after[stage]} == stages


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"data.max_tokens": 64}, ALL - {"spectra"}),
        ({"train.precision": "fp32"}, ALL - {"prepare", "spectra"}),
        ({"spectra.calibration_tokens": 100}, set()),
        ({"adapter.truncation": "authors"}, ALL - {"prepare", "spectra"}),
    ],
    ids=named,
)
def test_spectra_of_the_weights_alone_do_not_depend_on_text(recipe, changes, stages) -> None:
    before, after = chain(recipe(WEIGHT)), chain(recipe(WEIGHT | changes))
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def test_the_base_is_evaluated_once_for_all_adapters(recipe) -> None:
    of_base = keys.stage_keys(KeyInputs(recipe(), until="evaluate", trains=False))
    assert list(of_base) == ["prepare", "evaluate"]
    other = keys.stage_keys(KeyInputs(recipe({"adapter.alpha": 8}), until="evaluate", trains=False))
    assert of_base["evaluate"].key == other["evaluate"].key
    assert of_base["evaluate"].key != keys.stage_keys(KeyInputs(recipe()))["evaluate"].key


def test_every_setting_of_a_section_counts_unless_named_as_mechanics(recipe) -> None:
    ingredients = keys.stage_keys(KeyInputs(recipe()))["train"].ingredients
    assert set(ingredients["settings"]["train"]) == {
        "precision", "epochs", "max_steps", "batch_size", "learning_rate", "schedule", "warmup_share", "weight_decay",
        "gradient_clipping", "seed", "validate_every", "patience", "head_learning_rate",
    }  # fmt: skip


def test_what_the_recipe_comes_to_counts_not_how_it_says_so(recipe) -> None:
    named, derived = chain(recipe({"adapter.truncation_rank": 8, "adapter.rank": 8})), chain(recipe())
    assert named == derived
    without = {"adapter.singular_values": False}
    assert chain(recipe(without)) == chain(recipe(without | {"adapter.singular_value_weight": 1.0}))


def test_the_metrics_that_are_measured_count_by_name(recipe) -> None:
    evaluate = keys.stage_keys(KeyInputs(recipe()))["evaluate"].ingredients["settings"]["evaluate"]
    assert evaluate["measured"] == list(recipe().evaluate.measured)
    assert evaluate["generates"] is True


def test_what_a_manifest_keeps_of_a_key_is_read_back_as_it_was(recipe) -> None:
    for changes in ({}, {"adapter.method": "lora"}, {"base.head": "classification"}):
        for key in keys.stage_keys(KeyInputs(recipe(changes), "b", "s", TARGETS, "r")).values():
            assert json.loads(json.dumps(key.ingredients)) == key.ingredients


def test_of_a_deepspeed_file_only_what_is_inexact_counts(recipe, tmp_path) -> None:
    def trained(**settings: object) -> str:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        zero = {"stage": 3, **settings.pop("zero", {})}  # type: ignore[dict-item]
        file.write_text(json.dumps({"zero_optimization": zero, **settings}))
        return chain(recipe({"train.deepspeed": str(file)}))["train"]

    exact = chain(recipe())["train"]
    assert trained() == trained(zero={"reduce_bucket_size": 7, "zero_hpz_partition_size": 1}) == exact
    changed = trained(zero={"zero_quantized_nontrainable_weights": True}), trained(communication_data_type="fp16")
    assert len({exact, *changed}) == 3


@pytest.mark.parametrize(
    ("changes", "inputs", "order"),
    [
        ({}, {}, "prepare, spectra, audit, train, evaluate, register"),
        (WEIGHT, {}, "prepare + spectra, audit, train, evaluate, register"),
        ({}, {"champion": "k"}, "prepare + spectra, audit, train, evaluate, register"),
        ({"adapter.truncation": "none"}, {}, "prepare, train, evaluate, register"),
        ({"adapter.truncation": "none"}, {"champion": "k"}, "prepare, train, evaluate, register"),
        ({"adapter.truncation": "none"}, {"until": "evaluate"}, "prepare, train, evaluate"),
        (WEIGHT, {"until": "evaluate"}, "prepare + spectra, audit, train, evaluate"),
        ({"adapter.method": "corda"}, {"until": "evaluate"}, "prepare, spectra, train, evaluate"),
        ({"adapter.method": "lora"}, {"until": "train"}, "prepare, train"),
        ({}, {"until": "evaluate", "trains": False}, "prepare, evaluate"),
    ],
    ids=str,
)
def test_what_needs_nothing_of_another_stage_is_made_beside_it(recipe, changes, inputs, order) -> None:
    known = KeyInputs(recipe(changes), "b", "s", TARGETS, "r", **inputs)
    groups = keys.side_by_side(known)
    assert ", ".join(" + ".join(stage.name for stage in group) for group in groups) == order
    assert list(keys.stage_keys(known)) == [stage.name for group in groups for stage in group]


def test_with_dropout_it_counts_how_a_batch_is_dealt_out(recipe) -> None:
    """Random numbers are drawn for each pass of each worker. Without dropout only rounding depends on it."""

    def key(changes: dict, base_drops: bool = False) -> str:
        return keys.stage_keys(KeyInputs(recipe(changes), "b", "s", TARGETS, base_drops=base_drops))["train"].key

    dealt = [{"train.workers": 2}, {"train.micro_batch_size": 4}, {"train.pack_tokens": 4096}]
    for drops in ({"adapter.dropout": 0.1}, {"adapter.dropout": 0.1, "adapter.method": "lora"}):
        assert len({key(drops), *(key(drops | changes) for changes in dealt)}) == 4
        assert key(drops) == key(drops | {"train.deepspeed": "cpu_zero3"})
    assert len({key({}, True), *(key(changes, True) for changes in dealt)}) == 4
    assert {key({}), *(key(changes) for changes in dealt)} == {key({})}
    full = {"adapter.method": "full", "adapter.dropout": 0.1}  # which has no use for it
    assert key(full) == key(full | dealt[0])


def test_the_hungriest_stage_decides_what_the_cluster_must_have(recipe) -> None:
    many = {"train.workers": 4, "train.min_workers": 2, "train.cpus_per_worker": 3, "evaluate.workers": 5}
    assert keys.needed_resources(recipe()) == (1, 0)
    assert keys.needed_resources(recipe(many)) == (6, 0)
    assert keys.needed_resources(recipe(many | {"train.gpu": True})) == (6, 5)
