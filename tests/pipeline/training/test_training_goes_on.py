"""Going on from a saved adapter, in real training processes: all of it is taken over, and a kill changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kasa import read_adapter, save_adapter
from pipeline.config.recipe import parse_recipe
from tests.support.small_training import STEPS, outcome, prepare_run, small_base, small_recipe, train_run

# The champion is trained once, not once in every test process.
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("warm-start")]

ADAPTER = Path("work", "adapter")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A folder, the base, and spectra that are not those of the adapter in `folder/champion/work/adapter`."""
    folder = tmp_path_factory.mktemp("warm-start")
    base, spectra = small_base(folder)
    prepare_run(folder / "champion", spectra)
    train_run(small_recipe(base, folder, stage=2, workers=1), folder / "champion")
    return folder, base, {name: _other(triplets) for name, triplets in spectra.items()}


def _other(triplets: Any) -> Any:
    return type(triplets)(**{**vars(triplets), "singular_values_R": 2 * triplets.singular_values_R})


def _go_on(trained: tuple[Path, Path, dict[str, Any]], name: str, stage: int, **train: Any) -> tuple[Any, Path]:
    folder, base, spectra = trained
    run = folder / name
    prepare_run(run, spectra)
    save_adapter(run / "start", read_adapter(folder / "champion" / ADAPTER))
    values = small_recipe(base, folder, stage, workers=2).model_dump(mode="json", by_alias=True)
    values["train"] |= train
    return parse_recipe(values, name), run


@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (3, "bf16")])
def test_what_trains_with_no_rate_is_the_adapter_it_went_on_from(trained, stage: int, precision: str) -> None:
    # Bit for bit in bf16 too: the fp32 values that the optimizer holds are not rounded on the way.
    recipe, run = _go_on(
        trained, f"still-{stage}-{precision}", stage, precision=precision, max_steps=1, learning_rate=1e-30
    )
    train_run(recipe, run)
    before, after = read_adapter(trained[0] / "champion" / ADAPTER), read_adapter(run / ADAPTER)
    assert before.tensors.keys() == after.tensors.keys()
    assert [name for name in before.tensors if not torch.equal(before.tensors[name], after.tensors[name])] == []
    assert before.dropped.keys() == after.dropped.keys() != set()
    assert [name for name in before.dropped if not torch.equal(before.dropped[name], after.dropped[name])] == []
    assert after.weight_digests == before.weight_digests


def test_it_goes_on_where_the_other_ended_also_across_a_kill(trained) -> None:
    outcomes = []
    for name, killed_after in (("undisturbed", None), ("killed", 6)):
        recipe, run = _go_on(trained, name, 3)
        if killed_after:
            train_run(recipe, run, killed_after)
        train_run(recipe, run)
        outcomes.append(outcome(run))
    (records, values), (again, values_again) = outcomes
    assert [record["loss"] for record in records] == [record["loss"] for record in again]
    assert all(torch.equal(values[name], values_again[name]) for name in values)
    first, _ = outcome(trained[0] / "champion")
    assert len(first) == len(records) == STEPS
    assert abs(records[0]["task_loss"] - first[-1]["task_loss"]) < 0.5 * (
        first[0]["task_loss"] - first[-1]["task_loss"]
    )
