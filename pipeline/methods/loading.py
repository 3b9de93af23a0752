"""Putting a trained adapter onto its base, whatever method trained it: the files in its folder say which loader it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kasa import attach_saved, read_adapter
from kasa.adapter_file import ADAPTER_JSON, check_base
from kasa.errors import AdapterFileError
from kasa.interchange import PEFT_CONFIG
from pipeline.methods.full import WEIGHTS_JSON, base_of_weights, load_weights

# The file by which a folder of each format is recognised.
MARKS = (ADAPTER_JSON, PEFT_CONFIG, WEIGHTS_JSON)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter of some method."""
    return any((folder / mark).is_file() for mark in MARKS)


def attach_folder(model: nn.Module, folder: Path) -> None:
    """Put the adapter in `folder` into a loaded base, in place.

    Raises:
        AdapterFileError: the folder is no adapter, damaged, or made for another architecture.
    """
    if (folder / PEFT_CONFIG).exists() and not (folder / ADAPTER_JSON).exists():
        from pipeline.methods.peft import load_peft_folder  # slow, and needed for other methods than KaSA alone

        load_peft_folder(model, folder)
    elif (folder / WEIGHTS_JSON).exists():
        load_weights(model, folder)
    else:
        attach_saved(model, read_adapter(folder))


def merge_other(model: nn.Module, folder: Path) -> Any:
    """A loaded base with the adapter of another method than KaSA merged into its weights; the base given is changed.

    KaSA's adapters are merged without loading the base (`kasa.merge`).

    Raises:
        AdapterFileError: the folder is no such adapter, damaged, or made for another architecture.
    """
    if (folder / WEIGHTS_JSON).exists():
        load_weights(model, folder)
        return model
    from pipeline.methods.peft import load_peft_folder

    return load_peft_folder(model, folder).merge_and_unload()


def base_name(folder: Path) -> str:
    """Where the base of the adapter in `folder` came from: a folder or a hub id.

    Raises:
        AdapterFileError: the folder is no adapter, or damaged.
    """
    if (folder / ADAPTER_JSON).exists():
        return read_adapter(folder).base
    if (folder / WEIGHTS_JSON).exists():
        return base_of_weights(folder)
    from pipeline.methods.peft import base_of_peft_folder

    return base_of_peft_folder(folder)


def check_saved_base(folder: Path, base: Path) -> None:
    """Check that the base is the one that the adapter was trained on. Only KaSA adapters record enough for that.

    Raises:
        AdapterFileError: it is another one, or the folder holds no adapter.
    """
    if (folder / ADAPTER_JSON).exists():
        check_base(read_adapter(folder), base)
    elif not is_adapter(folder):
        raise AdapterFileError(f"{folder} holds no adapter: none of {', '.join(MARKS)}")
