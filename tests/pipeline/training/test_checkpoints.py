"""Training checkpoints: complete or absent, the newest few kept."""

import pytest
import torch

from kasa.errors import AdapterFileError
from pipeline.training.zero import (
    Checkpoint,
    load_checkpoint,
    newest_sound_checkpoint,
    newest_step,
    save_checkpoint,
)


def checkpoint(step: int) -> Checkpoint:
    moments = {f"{moment}/l.a": torch.rand(2, 3) for moment in ("exp_avg", "exp_avg_sq")}
    return Checkpoint(step, {"l.a": torch.rand(2, 3)}, moments)


def test_round_trip_and_how_many_are_kept(tmp_path) -> None:
    assert newest_step(tmp_path) == 0
    saved = [checkpoint(step) for step in (5, 10, 15)]
    for one in saved:
        save_checkpoint(tmp_path, one, kept=2)
    assert newest_step(tmp_path) == 15
    assert newest_step(tmp_path, at_most=14) == 10
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-0000010", "step-0000015"]
    loaded = load_checkpoint(tmp_path, 15)
    assert loaded.step == 15
    for ours, theirs in ((loaded.values, saved[-1].values), (loaded.moments, saved[-1].moments)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_best_is_kept_beside_the_newest(tmp_path) -> None:
    for step, best in ((5, 5), (10, 5), (15, 5), (20, 20)):
        save_checkpoint(tmp_path, checkpoint(step), kept=1, best=best)
        if step == 15:
            assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-0000005", "step-0000015"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-0000020"]


def test_what_an_interrupted_writer_left_is_no_checkpoint_and_is_cleared(tmp_path) -> None:
    save_checkpoint(tmp_path, checkpoint(5), kept=2)
    (tmp_path / ".step-0000010.77.partial").mkdir()
    (tmp_path / "step-0000020").mkdir()
    assert newest_step(tmp_path) == 5
    save_checkpoint(tmp_path, checkpoint(10), kept=2)
    assert not list(tmp_path.glob(".step-*"))


def test_a_damaged_checkpoint_is_refused(tmp_path) -> None:
    save_checkpoint(tmp_path, checkpoint(5), kept=2)
    file = tmp_path / "step-0000005" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(AdapterFileError, match="truncated"):
        load_checkpoint(tmp_path, 5)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path, checkpoint(step), kept=2)
    file = tmp_path / "step-0000010" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    assert getattr(newest_sound_checkpoint(tmp_path), "step", None) == 5
    assert newest_step(tmp_path) == 5
    (tmp_path / "step-0000005" / "tensors.safetensors").unlink()
    assert newest_sound_checkpoint(tmp_path) is None
