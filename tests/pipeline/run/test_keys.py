"""Which change of a recipe makes which stage anew."""

import pytest

from kasa.targets import Target
from pipeline.config.recipe import Recipe
from pipeline.run import graph as keys

TARGETS = [Target("q", 8, 8), Target("v", 4, 8)]
ALL = set(keys.STAGES)


def chain(recipe: Recipe, sources: str = "s", base: str = "b", targets=TARGETS, registry: str = "r") -> dict[str, str]:
    """The key of each stage, one made from another as in `pipeline.run.stages`."""
    prepare = keys.prepare_key(recipe, sources, base).key
    spectra = keys.spectra_key(recipe, base, targets, prepare).key
    audit = keys.audit_key(recipe, prepare, spectra).key
    train = keys.train_key(recipe, prepare, spectra).key
    evaluate = keys.evaluation_key(recipe, prepare, base, train).key
    register = keys.register_key(recipe, train, evaluate, registry).key
    return dict(zip(keys.STAGES, (prepare, spectra, audit, train, evaluate, register), strict=True))


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
        ({"adapter.truncation": "none", "spectra.rank": 8}, ALL - {"prepare", "spectra"}),
    ],
    ids=named,
)
def test_spectra_of_the_weights_alone_do_not_depend_on_text(recipe, changes, stages) -> None:
    before, after = chain(recipe(WEIGHT)), chain(recipe(WEIGHT | changes))
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def test_the_base_is_evaluated_once_for_all_adapters(recipe) -> None:
    of_base = keys.evaluation_key(recipe(), "prepared", "b", None).key
    assert of_base == keys.evaluation_key(recipe({"adapter.alpha": 8}), "prepared", "b", None).key
    assert of_base != keys.evaluation_key(recipe(), "prepared", "b", "adapter").key


def test_every_setting_of_a_section_counts_unless_named_as_mechanics(recipe) -> None:
    ingredients = keys.train_key(recipe(), "p", "s").ingredients
    assert set(ingredients["settings"]["train"]) == {
        "precision", "epochs", "max_steps", "batch_size", "learning_rate", "schedule", "warmup_share", "weight_decay",
        "gradient_clipping", "seed", "validate_every", "patience", "head_learning_rate",
    }  # fmt: skip
