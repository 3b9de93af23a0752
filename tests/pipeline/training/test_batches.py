"""Sample order and learning rate: pure functions of seed and step, whatever the number of workers."""

import numpy as np
import pytest

from pipeline.training.job import BatchPlan, learning_rate

LENGTHS = list(np.random.default_rng(0).integers(4, 90, 40))


def plan(workers: int = 1, micro: int = 2, seed: int = 0, batch: int = 8, pack_tokens: int | None = None) -> BatchPlan:
    return BatchPlan(LENGTHS, LENGTHS, 20, batch, micro, workers, seed, pack_tokens)


def test_every_sample_once_per_epoch_and_in_another_order_in_the_next() -> None:
    first = np.concatenate([plan().samples(step) for step in range(5)])
    second = np.concatenate([plan().samples(step) for step in range(5, 10)])
    assert sorted(first) == sorted(second) == list(range(40))
    assert list(first) != list(second)
    assert list(first) != list(range(40))


def test_epochs_follow_one_another_seamlessly() -> None:
    ragged = plan(batch=6)
    drawn = np.concatenate([ragged.samples(step) for step in range(20)])
    assert len(drawn) == 120
    for epoch in range(3):
        assert sorted(drawn[epoch * 40 : (epoch + 1) * 40]) == list(range(40))


def test_a_step_can_be_asked_for_in_any_order() -> None:
    forward = [list(plan().samples(step)) for step in range(12)]
    jumping = plan()
    assert [list(jumping.samples(step)) for step in reversed(range(12))] == forward[::-1]
    assert list(plan(seed=1).samples(0)) != forward[0]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_ranks_micro_batches_partition_the_same_global_batch(workers, micro) -> None:
    for step in range(7):
        passes = [plan(workers, micro).micro_batches(step, rank) for rank in range(workers)]
        assert {len(of_rank) for of_rank in passes} == {8 // (workers * micro)}
        assert all(len(indices) == micro for of_rank in passes for indices in of_rank)
        together = sorted(int(index) for of_rank in passes for indices in of_rank for index in indices)
        assert together == sorted(plan().samples(step))


@pytest.mark.parametrize("pack_tokens", [None, 90])
@pytest.mark.parametrize(("workers", "micro"), [(3, 1), (3, 2), (5, 1), (8, 4)])
def test_workers_that_do_not_divide_the_batch_share_it_all_the_same(workers, micro, pack_tokens) -> None:
    for step in range(7):
        passes = [plan(workers, micro, pack_tokens=pack_tokens).micro_batches(step, rank) for rank in range(workers)]
        assert len({len(of_rank) for of_rank in passes}) == 1
        if pack_tokens is None:
            assert all(len(indices) <= micro for of_rank in passes for indices in of_rank)
        together = sorted(int(index) for of_rank in passes for indices in of_rank for index in indices)
        assert together == sorted(plan().samples(step))


def test_samples_of_like_length_share_a_moment() -> None:
    passes = [plan(2, 2).micro_batches(0, rank) for rank in (0, 1)]
    moments = [[LENGTHS[i] for of_rank in passes for i in of_rank[moment]] for moment in range(2)]
    assert max(moments[0]) <= min(moments[1])


@pytest.mark.parametrize("pack_tokens", [90, 120, 1000])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_packs_partition_the_global_batch_and_hold_no_more_than_they_may(workers, pack_tokens) -> None:
    packing = plan(workers, pack_tokens=pack_tokens)
    for step in range(20):
        packs = [pack for rank in range(workers) for pack in packing.micro_batches(step, rank)]
        assert len(packs) == workers * packing.accumulation_steps
        assert all(0 < sum(LENGTHS[i] for i in pack) <= pack_tokens for pack in packs)
        assert sorted(i for pack in packs for i in pack) == sorted(packing.samples(step))


def test_packs_are_few_and_even() -> None:
    packing = plan(2, pack_tokens=200)
    fullest = max(sum(LENGTHS[i] for i in packing.samples(step)) for step in range(20))
    assert -(-fullest // 400) <= packing.accumulation_steps <= -(-fullest // 400) + 1
    loads = [sum(LENGTHS[i] for i in packing.micro_batches(3, rank)[0]) for rank in range(2)]
    assert max(loads) < 1.5 * min(loads)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rates_rise_to_the_peak_then_follow_the_schedule(schedule) -> None:
    rates = [learning_rate(step, 20, 1.0, 0.2, schedule) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == 1.0
    assert all(rate > 0 for rate in rates)
    decay = rates[4:]
    if schedule == "constant":
        assert set(decay) == {1.0}
        return
    assert decay == sorted(decay, reverse=True)
    assert decay[-1] < 0.1
    assert learning_rate(20, 20, 1.0, 0.2, schedule) == pytest.approx(0, abs=1e-12)
    halfway = learning_rate(12, 20, 1.0, 0.2, schedule)
    assert halfway == pytest.approx(0.5)


def test_without_warm_up_and_with_one_step() -> None:
    assert learning_rate(0, 10, 2.0, 0.0, "linear") == 2.0
    assert learning_rate(0, 1, 2.0, 0.06, "linear") == 2.0
