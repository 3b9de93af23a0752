"""Three workers share batches of eight: some have less to do than others, and the training is the same."""

from pathlib import Path

import pytest

from pipeline.config.recipe import parse_recipe
from tests.support.small_training import outcome, prepare_run, small_base, small_recipe, train_run


@pytest.mark.processes
@pytest.mark.parametrize("stage", [2, 3])
def test_three_workers_train_as_one(tmp_path: Path, stage: int) -> None:
    base, spectra = small_base(tmp_path)
    outcomes = []
    for workers in (1, 3):
        run = prepare_run(tmp_path / f"by-{workers}", spectra)
        values = small_recipe(base, tmp_path, stage, workers).model_dump(mode="json", by_alias=True)
        values["train"] |= {"micro_batch_size": 1, "max_steps": 8}
        train_run(parse_recipe(values, "shares"), run)
        outcomes.append(outcome(run))
    (records, values_1), (records_3, values_3) = outcomes
    assert [r["loss"] for r in records_3] == pytest.approx([r["loss"] for r in records], abs=1e-5)
    assert all((values_1[name] - values_3[name]).abs().max() < 1e-4 for name in values_1)
