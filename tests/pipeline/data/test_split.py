"""No prompt on both sides, no dependence on row order, and every removal counted."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError
from pipeline.data.prepared import Sample
from pipeline.data.split import group_key, split_samples
from pipeline.models.chat import Message

Make = Callable[..., DataSettings]


def pair(prompt: str, completion: str, location: str = "f:1") -> Sample:
    return Sample((Message("user", prompt), Message("assistant", completion)), location)


MANY = [
    pair(f"{'Prompt' if answer else 'prompt '} {number}", f"answer {answer}")
    for number in range(300)
    for answer in range(3)
]


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_is_on_both_sides_and_nothing_is_lost(settings: Make, seed: int) -> None:
    split = split_samples(MANY, None, settings(split_seed=seed, heldout_share=0.2))
    train, heldout = ({group_key(sample) for sample in side} for side in (split.train, split.heldout))
    assert not train & heldout
    assert {s.turns for s in split.train + split.heldout} == {s.turns for s in MANY}
    assert 30 < len(heldout) < 90


def test_row_order_does_not_matter_but_the_seed_does(settings: Make) -> None:
    shuffled = random.Random(0).sample(MANY, len(MANY))
    limits = {"train_rows": 50, "heldout_rows": 10}
    split = split_samples(MANY, None, settings(**limits))
    assert split == split_samples(shuffled, None, settings(**limits))
    assert split != split_samples(MANY, None, settings(split_seed=1, **limits))
    assert (len(split.train), len(split.heldout)) == (50, 9)  # three whole prompts


def test_a_prompt_keeps_its_side_when_data_is_added(settings: Make) -> None:
    before = split_samples(MANY[:450], None, settings())
    after = split_samples(MANY, None, settings())
    assert {group_key(s) for s in before.heldout} < {group_key(s) for s in after.heldout}


def test_a_limit_keeps_the_references_of_a_prompt_together(settings: Make) -> None:
    split = split_samples(MANY, None, settings(heldout_rows=9))
    assert len({group_key(sample) for sample in split.heldout}) == 3
    assert len(split.heldout) == 9


@pytest.mark.parametrize(("limit", "heldout"), [(1, 1), (17, 17), (120, 120), (150, 150), (1000, 150)])
def test_what_is_not_held_out_is_trained_on(settings: Make, limit: int, heldout: int) -> None:
    rows = [pair(f"question {number}", "a") for number in range(300)]
    split = split_samples(rows, None, settings(heldout_rows=limit))
    assert (len(split.heldout), len(split.train)) == (heldout, 300 - heldout)
    grown = split_samples([*rows, *MANY], None, settings(heldout_rows=limit))
    # What a model was trained on stays in training.
    assert {s.turns for s in split.train} <= {s.turns for s in grown.train} or limit >= 150


def test_of_a_named_source_the_first_prompts_are_used(settings: Make) -> None:
    split = split_samples(MANY, [pair(f"q {number}", "a") for number in range(20)], settings(heldout_rows=5))
    assert (len(split.heldout), len(split.train)) == (5, len(MANY))


def test_samples_that_differ_in_what_is_learned_are_no_duplicates(settings: Make) -> None:
    turns = [
        Message("user", "a"),
        Message("assistant", "b", learned=False),
        Message("user", "c"),
        Message("assistant", "d"),
    ]
    samples = [Sample((turns[0], turns[1]._replace(learned=learned), *turns[2:]), "f:1") for learned in (True, False)]
    split = split_samples([*samples, pair("x", "y")], None, settings())
    assert split.duplicates == 0
    again = split_samples([*samples[::-1], pair("x", "y")], None, settings())
    assert [s.turns for s in split.train] == [s.turns for s in again.train]


def test_validation_samples_are_whole_prompts_of_the_training_side(settings: Make) -> None:
    without = split_samples(MANY, None, settings())
    split = split_samples(MANY, None, settings(validation_rows=10, train_rows=500))
    train, validation = ({group_key(sample) for sample in side} for side in (split.train, split.validation))
    assert split.heldout == without.heldout
    assert len(split.validation) == 12  # three samples to a prompt
    assert len(validation) == 4
    assert not train & validation
    assert validation < {group_key(sample) for sample in without.train}
    assert len(split.train) == 500


def test_validation_leaves_something_to_train_on(settings: Make) -> None:
    with pytest.raises(DataError, match=r"data\.validation_rows 900 leaves nothing to train on"):
        split_samples(MANY, None, settings(validation_rows=900))


def test_duplicates_are_removed_and_counted(settings: Make) -> None:
    samples = [pair("a", "1", "f:1"), pair("a", "1", "f:2"), pair("A", "1", "f:3"), pair("b", "2", "f:4")]
    split = split_samples(samples, None, settings())
    assert split.duplicates == 1
    assert "f:2" not in {sample.location for sample in split.train + split.heldout}
    assert len(split.train + split.heldout) == 3


@pytest.mark.parametrize("seed", range(8))
def test_two_prompts_always_give_two_sides(settings: Make, seed: int) -> None:
    split = split_samples([pair("a", "1"), pair("b", "2")], None, settings(split_seed=seed, heldout_share=0.01))
    assert (len(split.train), len(split.heldout)) == (1, 1)


def test_a_named_heldout_source_is_protected_from_leaks(settings: Make) -> None:
    split = split_samples([pair("a  b", "1"), pair("c", "2")], [pair("A B", "3")], settings())
    assert [sample.prompt for sample in split.train] == ["c"]
    assert split.leaked == 1


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [
        ([pair("a", "1"), pair("a", "2")], None, "1 distinct prompt, too few"),
        ([], None, "0 distinct prompts, too few"),
        ([pair("a", "1")], [pair("a", "1")], "none is left"),
        ([pair("a", "1")], [], r"data\.heldout holds no usable sample"),
        ([], [pair("a", "1")], r"data\.train holds no usable sample"),
    ],
)
def test_an_empty_side_is_an_error(
    settings: Make, train: list[Sample], heldout: list[Sample] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        split_samples(train, heldout, settings())
