"""Where a training begins, and which spectra it is given: decided from the tags of the champion's version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kasa.targets import Target
from pipeline.artifacts.store import ArtifactStore
from pipeline.registry.store import ModelVersion
from pipeline.run import graph as keys
from pipeline.run.warm_start import WarmStart, adapter_tags, chosen_spectra_key, decide_warm_start, start_tags

TARGETS = [Target("q", 8, 8), Target("v", 4, 8)]
WARM = {"train.start": "champion"}


def champion_of(recipe, prepared: str, start: WarmStart | None = None, **tags: str) -> ModelVersion:
    """The version that a run of the recipe on the prepared data registers."""
    spectra = keys.spectra_key(recipe, "base", TARGETS, prepared).key
    trained = keys.train_key(recipe, prepared, spectra, start.train_key if start else None).key
    own = {"kasa.train_key": trained, "kasa.base_digest": "base", "kasa.spectra_key": spectra}
    return ModelVersion("tiny", "3", own | adapter_tags(recipe, TARGETS) | start_tags(start) | tags)


def test_new_data_goes_on_from_the_champion(recipe) -> None:
    champion = champion_of(recipe(WARM), "monday")
    beginning = decide_warm_start(recipe(WARM), champion, "base", TARGETS, "tuesday")
    assert beginning.start == WarmStart(
        "models:/tiny/3", champion.tags["kasa.train_key"], champion.tags["kasa.spectra_key"]
    )


@pytest.mark.parametrize("earlier", [None, WarmStart("models:/tiny/2", "k2", "s2")], ids=["scratch", "champion"])
def test_what_made_the_champion_begins_where_it_began(recipe, earlier) -> None:
    champion = champion_of(recipe(WARM), "monday", earlier)
    assert decide_warm_start(recipe(WARM), champion, "base", TARGETS, "monday").start == earlier
    assert decide_warm_start(recipe(WARM), champion, "base", TARGETS, "tuesday").start not in (None, earlier)


@pytest.mark.parametrize(
    ("changes", "base", "targets", "said"),
    [
        ({}, "other base", TARGETS, "belongs to another base"),
        ({"adapter.rank": 4}, "base", TARGETS, "adapter.rank: 8, not 4"),
        ({"adapter.alpha": 8}, "base", TARGETS, "adapter.alpha: 16, not 8"),
        ({"adapter.truncation": "weight"}, "base", TARGETS, "loss 8, not weight 8"),
        ({"adapter.truncation_rank": 2}, "base", TARGETS, "loss 8, not loss 2"),
        ({}, "base", TARGETS[:1], "adapts other modules"),
    ],
    ids=str,
)
def test_an_adapter_of_another_make_is_not_gone_on_from_and_the_reason_is_said(
    recipe, changes, base, targets, said
) -> None:
    champion = champion_of(recipe(WARM), "monday")
    beginning = decide_warm_start(recipe(WARM | changes), champion, base, targets, "tuesday")
    assert beginning.start is None
    assert said in beginning.reason
    assert "version 3" in beginning.reason


@pytest.mark.parametrize("changes", [{"train.learning_rate": 1e-3}, {"adapter.dropout": 0.5}, {"train.seed": 1}])
def test_what_is_no_part_of_the_adapter_may_differ(recipe, changes) -> None:
    champion = champion_of(recipe(WARM), "monday")
    assert decide_warm_start(recipe(WARM | changes), champion, "base", TARGETS, "monday").start is not None


def test_without_a_champion_or_the_wish_it_is_from_scratch(recipe) -> None:
    assert "no champion" in decide_warm_start(recipe(WARM), None, "base", TARGETS, "monday").reason
    assert decide_warm_start(recipe(), champion_of(recipe(), "monday"), "base", TARGETS, "tuesday").start is None
    untagged = ModelVersion("tiny", "3", {"kasa.train_key": "k", "kasa.base_digest": "base"})
    assert "does not say" in decide_warm_start(recipe(WARM), untagged, "base", TARGETS, "tuesday").reason


def test_spectra_are_those_of_the_adapter_while_they_are_there_and_do_not_change_the_training(
    recipe, tmp_path: Path
) -> None:
    store, warm = ArtifactStore(tmp_path), recipe(WARM)
    first = keys.spectra_key(warm, "base", TARGETS, "monday")
    start = WarmStart("models:/tiny/3", "k", first.key)

    def chosen() -> keys.StageKey:
        return chosen_spectra_key(warm, store, "base", TARGETS, "tuesday", start)

    gone = chosen()
    assert gone.key not in (first.key, keys.spectra_key(warm, "base", TARGETS, "tuesday").key)
    store.find_or_make(first, lambda folder: {})
    assert chosen().key == first.key
    assert json.loads(json.dumps(chosen().ingredients)) == first.ingredients
    trained = {keys.train_key(warm, "tuesday", one.key, start.train_key).key for one in (gone, first)}
    assert len(trained) == 1


def test_from_scratch_spectra_follow_the_data(recipe, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = {chosen_spectra_key(recipe(WARM), store, "base", TARGETS, day, None).key for day in ("monday", "tuesday")}
    assert len(made) == 2
