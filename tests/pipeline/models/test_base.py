"""Finding a base: which files are fetched and count, weights that are pickles, and files that change while a run reads them."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from pipeline.config.settings import BaseSettings
from pipeline.core.errors import BaseModelError
from pipeline.models.base import BaseModel, find_base
from pipeline.models.loading import load_base
from pipeline.models.prompting import Head, load_tokenizer
from tests.support.encoders import write_encoder

HUB = BaseSettings(model="owner/name")


def as_pickle(folder: Path, parts: int = 1, **extra: Any) -> Path:
    """The same checkpoint with its weights in `pytorch_model.bin` alone, in one file or in parts."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part in range(parts):
        name = "pytorch_model.bin" if parts == 1 else f"pytorch_model-{part + 1:05}-of-{parts:05}.bin"
        mine = {key: tensor for number, (key, tensor) in enumerate(tensors.items()) if number % parts == part}
        torch.save({**mine, **extra}, folder / name)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`hub(folder)` publishes a folder as owner/name; returns the list of downloads, each a list of file names."""

    def publish(folder: Path) -> list[list[str]]:
        downloads: list[list[str]] = []
        cache = tmp_path / "snapshots" / "abc123"

        def snapshot_download(model, revision, allow_patterns, local_files_only) -> str:
            assert model == "owner/name"
            assert revision in (None, "abc123")
            if local_files_only:
                if not cache.is_dir():
                    raise FileNotFoundError("not in the cache")
                return str(cache)
            cache.mkdir(parents=True, exist_ok=True)
            wanted = [f for f in sorted(folder.iterdir()) if any(fnmatch.fnmatch(f.name, p) for p in allow_patterns)]
            downloads.append([file.name for file in wanted])
            for file in wanted:
                shutil.copyfile(file, cache / file.name)
            return str(cache)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return downloads

    return publish


@pytest.mark.parametrize("parts", [1, 2])
def test_weights_that_are_pickles_alone_become_safetensors(tmp_path: Path, parts: int) -> None:
    plain = write_encoder(tmp_path / "plain", "bert")
    folder = as_pickle(write_encoder(tmp_path / "base", "bert"), parts)
    settings = BaseSettings(model=str(folder), head="classification")
    assert find_base(settings, tmp_path / "ws", fetch=False) is None
    assert not (tmp_path / "ws").exists()
    base = find_base(settings, tmp_path / "ws")
    assert base is not None
    assert base.folder.is_relative_to(tmp_path / "ws" / "sources")
    assert not list(base.folder.glob("*.bin"))
    assert base.targets("all-linear") == BaseModel("plain", plain, "classification").targets("all-linear")
    head = Head("classification", ("a", "b"))
    ours, theirs = (load_base(place, "fp32", head).state_dict() for place in (base.folder, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Once, and again where the pickle is another.
    again = find_base(settings, tmp_path / "ws", fetch=False)
    assert again is not None
    assert (again.folder, again.digest) == (base.folder, base.digest)
    file = next(folder.glob("*.bin"))
    os.utime(file, ns=(0, 0))
    assert find_base(settings, tmp_path / "ws", fetch=False) is None


class Evil:
    def __reduce__(self) -> Any:
        return (open, (Evil.place, "w"))

    place = ""


def test_a_pickle_that_holds_more_than_weights_is_refused_unopened(tmp_path: Path) -> None:
    Evil.place = str(tmp_path / "ran")
    folder = as_pickle(write_encoder(tmp_path / "base", "bert"), extra=Evil())
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin is damaged, or holds more than weights"):
        find_base(BaseSettings(model=str(folder)), tmp_path / "ws")
    assert not (tmp_path / "ran").exists()
    (folder / "pytorch_model.bin").write_bytes(b"cut")
    with pytest.raises(BaseModelError, match="damaged"):
        find_base(BaseSettings(model=str(folder)), tmp_path / "ws")
    assert all(left.suffix == ".lock" for left in (tmp_path / "ws" / "sources").iterdir())


def test_weights_come_last_from_the_hub_and_pickles_only_where_there_is_nothing_else(tmp_path: Path, hub: Any) -> None:
    folder = write_encoder(tmp_path / "base", "bert")
    (folder / "flax_model.msgpack").write_bytes(b"x")
    (folder / "spm.model").write_bytes(b"x")
    (folder / "sentencepiece.bpe.model").write_bytes(b"x")
    assert find_base(HUB, tmp_path / "ws", fetch=False) is None
    downloads = hub(folder)
    base = find_base(HUB, tmp_path / "ws")
    assert base is not None
    small, weights = downloads
    assert {"config.json", "tokenizer.json", "spm.model", "sentencepiece.bpe.model"} <= set(small)
    assert weights == ["model.safetensors"]
    before = base.digest
    (base.folder / "spm.model").write_bytes(b"y")
    assert BaseModel("name", base.folder).digest != before


def test_pickles_come_from_the_hub_where_there_is_nothing_else(tmp_path: Path, hub: Any) -> None:
    downloads = hub(as_pickle(write_encoder(tmp_path / "base", "bert")))
    base = find_base(HUB, tmp_path / "ws")
    assert base is not None
    assert downloads[1:] == [[], ["pytorch_model.bin"]]
    assert (base.folder / "model.safetensors").exists()


@pytest.mark.parametrize("fault", ["tokenizer", "code"])
def test_a_base_that_cannot_be_used_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, hub: Any, fault: str
) -> None:
    folder = write_encoder(tmp_path / "base", "bert")
    if fault == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    downloads = hub(folder)
    with pytest.raises(BaseModelError, match={"tokenizer": "no tokenizer", "code": "code of its own"}[fault]):
        find_base(HUB, tmp_path / "ws")
    assert len(downloads) == 1


def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_read(tmp_path: Path) -> None:
    """As DeBERTa-v3 is published."""
    folder = write_encoder(tmp_path / "base", "deberta-v2")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "text").write_text("the film was good and the cast was bad\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(folder / "spm"), vocab_size=22, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]", pad_piece="[PAD]", minloglevel=2,
    )  # fmt: skip
    (folder / "spm.vocab").unlink()
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("the film")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "the film"
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id


def replaced_and_put_back(folder: Path) -> None:
    file = folder / "model.safetensors"
    kept = folder / "kept"
    file.rename(kept)
    shutil.copyfile(kept, file)
    kept.rename(file)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"other"), "model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "added_tokens.json").write_text("{}"), "added_tokens.json"),
        (replaced_and_put_back, "model.safetensors"),
    ],
    ids=["written", "removed", "added", "put back"],
)
def test_files_that_change_after_the_digest_was_taken_are_named(tmp_path: Path, change: Any, name: str) -> None:
    folder = write_encoder(tmp_path / "base", "bert")
    base = BaseModel("name", folder)
    assert base.digest
    base.check_unchanged()
    (folder / "README.md").write_text("of no matter")
    base.check_unchanged()
    change(folder)
    with pytest.raises(BaseModelError, match=f"{name} was changed while the run read it"):
        base.check_unchanged()


def test_who_lacks_the_package_for_a_sentencepiece_model_is_told_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_encoder(tmp_path / "base", "deberta-v2")
    (folder / "tokenizer.json").unlink()
    (folder / "spm.model").write_bytes(b"x")
    monkeypatch.setattr("pipeline.models.prompting.find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match="pip install sentencepiece"):
        load_tokenizer(folder)


def test_a_mistyped_folder_is_no_error_of_the_hub_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    Path("models/tiny").mkdir(parents=True)
    said = r"models/tny is no folder here; did you mean models/tiny\? and as a hub id it cannot be fetched"
    with pytest.raises(BaseModelError, match=said):
        find_base(BaseSettings(model="models/tny"), tmp_path)
    with pytest.raises(BaseModelError, match=r"organisation/name is no folder here; and as a hub id"):
        find_base(BaseSettings(model="organisation/name"), tmp_path)


def test_a_mistyped_path_is_answered_with_what_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/model.safetensors").touch()
    for mistyped, hint in (
        ("./bse", r"; did you mean .*base\?$"),
        ("./base/model.safetensors", "; give the folder, .*base$"),
    ):
        with pytest.raises(BaseModelError, match=f"neither a folder nor a hub id .*{hint}"):
            find_base(BaseSettings(model=mistyped), tmp_path)


@pytest.mark.parametrize("model", ["{folder}", "embedded:smollm2-135m-instruct"])
def test_a_revision_of_what_has_none_is_refused(tmp_path: Path, model: str) -> None:
    settings = BaseSettings(model=model.format(folder=tmp_path), revision="main")
    with pytest.raises(BaseModelError, match=r"base\.revision main: .* has no revisions; remove base\.revision"):
        find_base(settings, tmp_path)
