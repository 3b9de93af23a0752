"""What a person reads while a run goes on."""

import pytest

from pipeline.core.console import ProgressBars, time_left
from pipeline.run.stages.train import progress_note


@pytest.mark.parametrize(
    ("seconds", "done", "to_do", "said"),
    [
        (10, 5, 15, "about 30 s left"),
        (10, 5, 50, "about 2 min left"),
        (3600, 10, 100, "about 10 h left"),
        (10, 0, 15, ""),
        (10, 5, 0, ""),
    ],
)
def test_time_left(seconds, done, to_do, said) -> None:
    assert time_left(seconds, done, to_do) == said


def test_how_far_the_work_has_come_is_known_to_whoever_stops_it() -> None:
    bars = ProgressBars()
    bars.update("prepare", 20, 200, "rows")
    assert ProgressBars.reached == "in prepare after 20 of 200 rows"
    bars.update("train", 12, 60, "loss 2.000", unit="step")
    assert ProgressBars.reached == "after step 12 of 60"
    with bars.labelled("kasa, seed 1") as inner:
        inner.update("train", 13, 60, "loss 1.900", unit="step")
    assert ProgressBars.reached == "in kasa, seed 1 after step 13 of 60"


def test_a_training_says_loss_speed_memory_and_what_it_waits_for() -> None:
    record = {"task_loss": 2.0, "tokens_per_second": 99.6, "memory_gib": 1.25, "data_wait_share": 0.001}
    assert progress_note([record]) == "loss 2.000, 100 tokens/s, 1.2 GiB"
    looked = record | {"validation_loss": 3.0, "data_wait_share": 0.25}
    assert progress_note([looked, record]) == "loss 2.000, validation 3.000, 100 tokens/s, 1.2 GiB"
    assert progress_note([looked]) == "loss 2.000, validation 3.000, 100 tokens/s, 25% of the time for data, 1.2 GiB"
