"""Adapters and checkpoints on disk: what is written comes back, what is damaged is refused, nothing is half-written."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kasa import (
    CheckpointWeights,
    attach,
    attach_saved,
    capture_adapter,
    find_targets,
    folders,
    read_adapter,
    save_adapter,
)
from kasa.adapter import frozen_factors, trainable_parameters
from kasa.adapter_file import SavedAdapter, check_base
from kasa.checkpoint import weight_digest
from kasa.errors import AdapterFileError, DamagedFileError, SpectrumError
from kasa.files import check_sealed_folder, seal_folder, sealed_json
from kasa.targets import Target
from tests.kasa.shapes import Shapes


@pytest.fixture
def base_folder(tmp_path: Path, model) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def adapter(model, spectra, config, base_folder) -> SavedAdapter:
    targets = find_targets(model, "all-linear")
    weights = CheckpointWeights(base_folder)
    digests = {target.name: weight_digest(weights.weight(target)) for target in targets}
    attach(model, targets, config, spectra)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator)

    def copies(parameters):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    return SavedAdapter(
        config, tuple(targets), "a base", digests, copies(trainable_parameters(model)), copies(frozen_factors(model))
    )


def test_round_trip(adapter, tmp_path) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    loaded = read_adapter(tmp_path / "adapter")
    for field in ("config", "targets", "base", "weight_digests"):
        assert getattr(loaded, field) == getattr(adapter, field)
    for field in ("tensors", "dropped"):
        ours, theirs = getattr(loaded, field), getattr(adapter, field)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_live_adapter_is_captured_whole(adapter, model, base_folder) -> None:
    captured = capture_adapter(model, adapter.config, base_folder)
    assert (captured.targets, captured.weight_digests) == (adapter.targets, adapter.weight_digests)
    for field in ("tensors", "dropped"):
        ours, theirs = getattr(captured, field), getattr(adapter, field)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    next(iter(trainable_parameters(model).values())).data.zero_()
    assert all(tensor.any() for tensor in captured.tensors.values())


def test_a_loaded_adapter_computes_what_the_saved_one_did(adapter, model, tmp_path) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    fresh = Shapes()
    fresh.load_state_dict({name.replace(".base.", "."): t for name, t in model.state_dict().items()}, strict=False)
    attach_saved(fresh, read_adapter(tmp_path / "adapter"))
    assert set(trainable_parameters(fresh)) == set(trainable_parameters(model))
    for name in ("square", "tall", "wide", "conv"):
        x = torch.randn(3, model.get_submodule(name).target.in_features)
        assert torch.equal(fresh.get_submodule(name)(x), model.get_submodule(name)(x))


def test_attach_saved_refuses_another_architecture(adapter) -> None:
    with pytest.raises(AdapterFileError, match="no module square"):
        attach_saved(torch.nn.Sequential(torch.nn.Linear(3, 3)), adapter)
    narrow = Shapes()
    narrow.square = torch.nn.Linear(24, 25)
    with pytest.raises(AdapterFileError, match="square is 25 x 24, the adapter's is 24 x 24"):
        attach_saved(narrow, adapter)


@pytest.mark.parametrize("missing", ["adapter.json", "tensors.safetensors"])
def test_a_missing_file(adapter, tmp_path, missing) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    (tmp_path / "adapter" / missing).unlink()
    with pytest.raises(AdapterFileError, match=f"not complete: {missing} is missing"):
        read_adapter(tmp_path / "adapter")


def test_a_truncated_file(adapter, tmp_path) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    file = tmp_path / "adapter" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match="truncated or was changed"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("place", [5, -1])
def test_a_changed_byte(adapter, tmp_path, place) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    file = tmp_path / "adapter" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(AdapterFileError, match="truncated or was changed"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '"text"'])
def test_a_damaged_json(adapter, tmp_path, text) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    (tmp_path / "adapter" / "adapter.json").write_text(text)
    with pytest.raises(AdapterFileError):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("old", "new"), [('"rank": 6', '"rank": 5'), ('"alpha": 9', '"alpha": 8'), ('"a base"', '"no base"')]
)
def test_a_changed_fact(adapter, tmp_path, old, new) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    file = tmp_path / "adapter" / "adapter.json"
    assert folders.is_sound(tmp_path / "adapter", "adapter.json")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert not folders.is_sound(tmp_path / "adapter", "adapter.json")
    with pytest.raises(AdapterFileError, match=r"adapter\.json was changed"):
        read_adapter(tmp_path / "adapter")


def test_a_sealed_folder(tmp_path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name, text in (("a.json", "{}"), ("deep/b", "text")):
        (folder / name).write_text(text)
    check_sealed_folder(folder)  # never sealed
    seal_folder(folder)
    seal_folder(folder)
    check_sealed_folder(folder)
    for damage in ("a.json", "deep/b", "files.json"):
        whole = (folder / damage).read_bytes()
        (folder / damage).write_bytes(whole[:-1])
        with pytest.raises(DamagedFileError, match=damage):
            check_sealed_folder(folder)
        (folder / damage).write_bytes(whole)
    (folder / "deep" / "b").unlink()
    with pytest.raises(DamagedFileError, match="deep/b cannot be read"):
        check_sealed_folder(folder)


def test_a_json_without_its_facts(adapter, tmp_path) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    file = tmp_path / "adapter" / "adapter.json"
    facts = json.loads(file.read_text())
    for key, value in (("config", None), ("config", {"rnak": 8}), ("targets", None), ("base", None)):
        changed = {k: v for k, v in facts.items() if k not in (key, "sha256")} | ({key: value} if value else {})
        file.write_text(sealed_json(changed))
        with pytest.raises(AdapterFileError, match="another version"):
            read_adapter(tmp_path / "adapter")


def test_the_base_is_compared_byte_for_byte(adapter, base_folder, model) -> None:
    check_base(adapter, base_folder)
    state = {name.replace(".base.", "."): tensor.clone() for name, tensor in model.state_dict().items()}
    state["tall.weight"][0, 0] += 1e-6
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, base_folder / "model.safetensors")
    with pytest.raises(AdapterFileError, match=r"trained on a base; tall in .* is another weight"):
        check_base(adapter, base_folder)


def test_nothing_half_written(adapter, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "adapter"

    def full_disk(tensors, path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_adapter(folder, adapter)
    assert not folder.exists()
    monkeypatch.undo()
    save_adapter(folder, adapter)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(folders, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_adapter(folder, dataclasses.replace(adapter, base="another"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_is_replaced_whole(adapter, tmp_path) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    (tmp_path / "adapter" / "stray").write_text("old")
    save_adapter(tmp_path / "adapter", dataclasses.replace(adapter, base="another"))
    assert read_adapter(tmp_path / "adapter").base == "another"
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {"adapter.json", "tensors.safetensors"}
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


# Reading single weights from a checkpoint.


def checkpoint(folder: Path, *shards: dict[str, torch.Tensor]) -> CheckpointWeights:
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}.safetensors")
    return CheckpointWeights(folder)


def test_weights_are_found_in_any_shard(tmp_path) -> None:
    first, second = torch.randn(4, 6), torch.randn(6, 4).bfloat16()
    weights = checkpoint(tmp_path, {"m.x.weight": first}, {"m.y.weight": second})
    assert torch.equal(weights.weight(Target("m.x", 4, 6)), first)
    assert torch.equal(weights.weight(Target("m.y", 6, 4)), second)
    assert weights.weight(Target("m.y", 6, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(("stored", "name"), [("h.0.x.weight", "transformer.h.0.x"), ("model.h.x.weight", "h.x")])
def test_a_model_prefix_may_be_missing_or_extra(tmp_path, stored, name) -> None:
    weights = checkpoint(tmp_path, {stored: torch.ones(4, 6), "other.weight": torch.zeros(4, 6)})
    assert weights.weight(Target(name, 4, 6)).all()


def test_a_suffix_that_fits_two_tensors_fits_none(tmp_path) -> None:
    weights = checkpoint(tmp_path, {"a.h.x.weight": torch.ones(4, 6), "b.h.x.weight": torch.ones(4, 6)})
    with pytest.raises(SpectrumError, match=r"stores no weight h\.x\.weight; did you mean"):
        weights.weight(Target("h.x", 4, 6))
    # Half a name is no suffix.
    with pytest.raises(SpectrumError, match="stores no weight"):
        weights.weight(Target("x.h.x", 4, 6))


def test_conv1d_is_read_as_out_by_in(tmp_path) -> None:
    stored = torch.randn(6, 4)
    weights = checkpoint(tmp_path, {"x.weight": stored})
    assert torch.equal(weights.weight(Target("x", 4, 6, transposed=True)), stored.T)


def test_a_wrong_shape_names_both(tmp_path) -> None:
    weights = checkpoint(tmp_path, {"x.weight": torch.ones(4, 6)})
    with pytest.raises(SpectrumError, match=r"x\.weight is \(4, 6\), but the model's configuration makes it 6 x 4"):
        weights.weight(Target("x", 6, 4))


def test_no_shard_and_a_damaged_shard(tmp_path) -> None:
    with pytest.raises(SpectrumError, match=r"holds no \.safetensors files"):
        CheckpointWeights(tmp_path).weight(Target("x", 4, 6))
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(SpectrumError, match=r"model\.safetensors is damaged"):
        CheckpointWeights(tmp_path).weight(Target("x", 4, 6))


def test_the_digest_sees_type_shape_and_every_byte() -> None:
    weight = torch.arange(12, dtype=torch.float32).view(3, 4)
    digest = weight_digest(weight)
    assert weight_digest(weight.clone()) == digest
    assert weight_digest(weight.T.contiguous().T) == digest
    others = [weight.view(4, 3), weight.T, weight.bfloat16(), weight.double(), weight + torch.eye(3, 4) * 1e-6]
    assert len({digest, *(weight_digest(other) for other in others)}) == 6
