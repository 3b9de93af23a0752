"""Why an artifact is made although others are there; what the store holds."""

import pytest

from pipeline.run.dependencies import KeyInputs
from pipeline.run.graph import stage_keys
from pipeline.run.lineage import ingredients_by_name, stored_artifacts, why_made
from pipeline.storage.artifacts import ArtifactStore, StageKey

BASE, DATA = "b" * 64, "d" * 64


def chain(recipe, data: str = DATA, base: str = BASE) -> list[StageKey]:
    made = stage_keys(KeyInputs(recipe, base, data))
    return [made[stage] for stage in ("prepare", "spectra", "train")]


def known(*chains: list[StageKey]) -> dict:
    return {f"{key.stage}/{key.key}": key.ingredients for one in chains for key in one}


@pytest.mark.parametrize(
    ("changes", "inputs", "reasons"),
    [
        ({"train.learning_rate": 0.001}, {}, ["train.learning_rate 0.0005 -> 0.001"]),
        ({"train.workers": 2}, {}, []),
        ({"data.max_tokens": 64}, {}, ["data.max_tokens 512 -> 64"]),
        ({}, {"data": "e" * 64}, ["the sources changed"]),
        ({}, {"base": "c" * 64}, ["the base changed"]),
        (
            {"train.seed": 1, "data.split_seed": 2},
            {},
            ["train.seed 0 -> 1", "data.split_seed 0 -> 2"],
        ),
    ],
)
def test_the_first_cause_is_named(recipe, changes, inputs, reasons) -> None:
    before, after = chain(recipe()), chain(recipe(changes), **inputs)
    assert sorted(why_made(after[-1], known(before, after))) == sorted(reasons)


def test_changed_code_and_versions_are_named() -> None:
    old = StageKey("train", {"code": {"kasa": "1", "pipeline.training": "1"}, "versions": {"torch": "1"}})
    new = StageKey("train", {"code": {"kasa": "2", "pipeline.training": "1"}, "versions": {"torch": "2"}})
    assert why_made(new, known([old])) == ["the code of kasa changed", "torch 1 -> 2"]


def test_of_many_changed_modules_some_are_named() -> None:
    old, new = (StageKey("train", {"code": {f"kasa.{n}": version for n in "abcdef"}}) for version in "12")
    assert why_made(new, known([old])) == ["the code of kasa.a, kasa.b, kasa.c, kasa.d and 2 more changed"]


def test_the_most_similar_is_compared_with(recipe) -> None:
    far = chain(recipe({"train.seed": 1, "train.batch_size": 4, "adapter.alpha": 1}))
    near = chain(recipe({"train.seed": 1}))
    for order in ((far, near), (near, far)):
        assert why_made(chain(recipe())[-1], known(*order)) == ["train.seed 1 -> 0"]


def test_the_base_alone_is_not_compared_with(recipe) -> None:
    of_base, of_adapter = (
        stage_keys(KeyInputs(recipe(), BASE, until="evaluate", trains=trains))["evaluate"] for trains in (False, True)
    )
    assert why_made(of_adapter, known([of_base])) == []


def test_an_input_that_is_gone_is_named_by_its_key(recipe) -> None:
    before, after = chain(recipe()), chain(recipe({"data.max_tokens": 64}))
    reasons = why_made(after[-1], known(before[-1:], after))
    assert f"prepare {before[0].key} -> {after[0].key}" in reasons


def test_the_first_of_its_kind_has_no_reasons(recipe) -> None:
    assert why_made(chain(recipe())[-1], {}) == []


def test_the_store_is_listed_without_what_is_incomplete(tmp_path, recipe) -> None:
    store = ArtifactStore(tmp_path)
    prepare, spectra, train = chain(recipe())
    for key in (train, prepare):
        store.find_or_make(key, lambda folder: {"rows": (folder / "file").write_text("1234")})
    (store.root / "spectra" / f"{spectra.key}.partial").mkdir(parents=True)
    damaged = store.root / "prepare" / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    found = stored_artifacts(store)
    assert [one.name for one in found] == [f"prepare/{prepare.key}", f"train/{train.key}"]
    assert list(found[1].inputs) == [f"prepare/{prepare.key}", f"spectra/{spectra.key}"]
    assert found[0].facts == {"rows": 4}
    assert found[0].size > 4
    assert ingredients_by_name(found)[found[0].name] == prepare.ingredients
