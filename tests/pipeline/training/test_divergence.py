"""A training that has gone wrong stops at once, and says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.recipe import parse_recipe
from pipeline.core.files import read_journal
from pipeline.training.job import JOURNAL, journalled_error
from pipeline.training.step import TokenObjective, divergence
from tests.support.small_training import prepare_run, small_base, small_recipe, train_run

NAN, INFINITE = float("nan"), float("inf")
WELL = {"loss": 3.0, "task_loss": 2.9, "gradient_norm": 100.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"loss": NAN}, "the loss became nan"),
        ({"loss": INFINITE}, "the loss became inf"),
        ({"gradient_norm": NAN}, "the gradient's norm became nan"),
        # The regularisers' part may be as large as it likes.
        ({"loss": 500.0}, None),
        ({"task_loss": 11.0}, None),
        ({"task_loss": 11.2}, "the loss exploded to 11.2, where guessing costs 5.545"),
    ],
)
def test_what_is_wrong(changes: dict[str, float], said: str | None) -> None:
    assert divergence(WELL | changes, *TokenObjective(256).largest_loss) == said


def test_a_step_without_a_norm() -> None:
    assert divergence({"loss": 3.0, "task_loss": 3.0}, *TokenObjective(256).largest_loss) is None


@pytest.mark.processes
def test_a_training_that_goes_wrong_names_step_samples_and_checkpoint(tmp_path: Path) -> None:
    base, spectra = small_base(tmp_path)
    values = small_recipe(base, tmp_path, 2, workers=1).model_dump(mode="json", by_alias=True)
    values["train"] |= {"learning_rate": 1e6, "checkpoint_every": 1}
    run = prepare_run(tmp_path / "run", spectra)
    with pytest.raises(RuntimeError, match="ended with 1"):
        train_run(parse_recipe(values, "goes wrong"), run)
    error = journalled_error(run / "work")
    assert error is not None
    assert error["mistake"]
    said = error["error"]
    step = len(read_journal(run / "work" / JOURNAL))
    assert f" became nan in step {step} (samples row " in said
    assert f"the checkpoint of step {step - 1} is kept" in said
    assert "lower train.learning_rate" in said
