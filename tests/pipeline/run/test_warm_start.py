"""Where a training begins, and which spectra it is given: decided from the tags of the champion's version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kasa.targets import Target
from pipeline.registry.store import ModelVersion
from pipeline.run.dependencies import KeyInputs
from pipeline.run.graph import stage_keys
from pipeline.run.warm_start import WarmStart, adapter_tags, decide_warm_start, start_tags, starting_from
from pipeline.storage.artifacts import ArtifactStore, StageKey

TARGETS = [Target("q", 8, 8), Target("v", 4, 8)]
WARM = {"train.start": "champion"}


def inputs(recipe, sources: str, base: str = "base", targets=TARGETS) -> KeyInputs:
    return KeyInputs(recipe, base, sources, targets)


def champion_of(recipe, sources: str, start: WarmStart | None = None, **tags: str) -> ModelVersion:
    """The version that a run of the recipe on the data registers."""
    spectra = stage_keys(inputs(recipe, sources))["spectra"].key
    trained = stage_keys(replace(inputs(recipe, sources), champion=start.train_key if start else None))["train"].key
    own = {"kasa.train_key": trained, "kasa.base_digest": "base", "kasa.spectra_key": spectra}
    return ModelVersion("tiny", "3", own | adapter_tags(recipe, TARGETS) | start_tags(start) | tags)


def test_new_data_goes_on_from_the_champion(recipe) -> None:
    champion = champion_of(recipe(WARM), "monday")
    beginning = decide_warm_start(inputs(recipe(WARM), "tuesday"), champion)
    assert beginning.start == WarmStart(
        "models:/tiny/3", champion.tags["kasa.train_key"], champion.tags["kasa.spectra_key"]
    )


@pytest.mark.parametrize("earlier", [None, WarmStart("models:/tiny/2", "k2", "s2")], ids=["scratch", "champion"])
def test_what_made_the_champion_begins_where_it_began(recipe, earlier) -> None:
    champion = champion_of(recipe(WARM), "monday", earlier)
    assert decide_warm_start(inputs(recipe(WARM), "monday"), champion).start == earlier
    assert decide_warm_start(inputs(recipe(WARM), "tuesday"), champion).start not in (None, earlier)


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
    beginning = decide_warm_start(inputs(recipe(WARM | changes), "tuesday", base, targets), champion)
    assert beginning.start is None
    assert said in beginning.reason
    assert "version 3" in beginning.reason


@pytest.mark.parametrize("changes", [{"train.learning_rate": 1e-3}, {"adapter.dropout": 0.5}, {"train.seed": 1}])
def test_what_is_no_part_of_the_adapter_may_differ(recipe, changes) -> None:
    champion = champion_of(recipe(WARM), "monday")
    assert decide_warm_start(inputs(recipe(WARM | changes), "monday"), champion).start is not None


def test_without_a_champion_or_the_wish_it_is_from_scratch(recipe) -> None:
    assert "no champion" in decide_warm_start(inputs(recipe(WARM), "monday"), None).reason
    assert decide_warm_start(inputs(recipe(), "tuesday"), champion_of(recipe(), "monday")).start is None
    untagged = ModelVersion("tiny", "3", {"kasa.train_key": "k", "kasa.base_digest": "base"})
    assert "does not say" in decide_warm_start(inputs(recipe(WARM), "tuesday"), untagged).reason


def test_spectra_are_those_of_the_adapter_while_they_are_there_and_do_not_change_the_training(
    recipe, tmp_path: Path
) -> None:
    store, warm = ArtifactStore(tmp_path), recipe(WARM)
    first = stage_keys(inputs(warm, "monday"))["spectra"]
    start = WarmStart("models:/tiny/3", "k", first.key)

    def chosen(recompute: tuple[str, ...] = ()) -> dict[str, StageKey]:
        return stage_keys(starting_from(inputs(warm, "tuesday"), start, store, recompute))

    gone = chosen()
    assert gone["spectra"].key not in (first.key, stage_keys(inputs(warm, "tuesday"))["spectra"].key)
    store.find_or_make(first, lambda folder: {})
    there = chosen()
    assert there["spectra"].key == first.key
    assert json.loads(json.dumps(there["spectra"].ingredients)) == first.ingredients
    assert there["train"].key == gone["train"].key
    # What was computed from Monday's text cannot be computed again: what the adapter holds of it can.
    assert chosen(recompute=("spectra",))["spectra"].key == gone["spectra"].key


def test_from_scratch_spectra_follow_the_data(recipe, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = {
        stage_keys(starting_from(inputs(recipe(WARM), day), None, store))["spectra"].key
        for day in ("monday", "tuesday")
    }
    assert len(made) == 2
