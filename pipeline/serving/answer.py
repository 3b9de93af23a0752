"""Adapters by the names that commands take, and what they answer: the work of `kasa generate`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kasa.adapter_file import ADAPTER_JSON
from kasa.files import check_sealed_folder
from pipeline.config.settings import BaseSettings
from pipeline.core.errors import ModelError
from pipeline.core.files import ADAPTER, user_path
from pipeline.core.machine import fast_precision
from pipeline.methods.loading import base_name, check_saved_base, is_adapter
from pipeline.models.base import find_base
from pipeline.models.prompting import PROMPTING_FILE, Prompting
from pipeline.registry.store import SCHEME, open_registry
from pipeline.serving.inference import LoadedModel, load_model, load_registered

DEFAULT_NEW_TOKENS = 64


def answer(
    model: str, texts: Sequence[str], workspace: Path, base: Path | None, max_new_tokens: int | None
) -> list[str]:
    """Greedy answers to prompts; classes or values of texts where the model has a trained head.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, an adapter folder, or one that was exported as merged.
        texts: what to answer; a head for pairs splits each at ` ||| `.
        workspace: the workspace of the run, for the registry and the recorded base.
        base: the base's folder, where it is not the recorded one.
        max_new_tokens: length limit; None takes that of the evaluation, or 64 for a folder.

    Raises:
        ModelError: there is no such model.
        BaseModelError, AdapterFileError: its base is missing, or is another one.
    """
    if is_merged(model):
        if base:
            raise ModelError(f"{model} is merged and needs no base; leave out --base")
        merged, precision = user_path(model), fast_precision(torch.cuda.is_available())
        loaded = load_model(merged, None, precision, prompting=Prompting.load(merged))
        return loaded.answers(texts, max_new_tokens or DEFAULT_NEW_TOKENS)
    with located_adapter(model, workspace) as (folder, config):
        if config is None:
            loaded, limit = _load_folder(folder, workspace, base), DEFAULT_NEW_TOKENS
        else:
            loaded, limit = load_registered(folder, config, base), int(config["max_new_tokens"])
        return loaded.answers(texts, max_new_tokens or limit)


def is_merged(model: str) -> bool:
    """Whether this is a folder that was exported as merged."""
    folder = user_path(model)
    return not model.startswith(SCHEME) and (folder / PROMPTING_FILE).is_file() and not is_adapter(folder)


@contextmanager
def located_adapter(model: str, workspace: Path) -> Iterator[tuple[Path, Mapping[str, Any] | None]]:
    """The folder of an adapter that is named by its folder or by a registry URI.

    Yields:
        The folder, and the configuration of the registered version (None for a folder). Files from the registry exist
        within the block only.

    Raises:
        ModelError: there is no such model, or it has no adapter.
        DamagedFileError: a file of the adapter was changed.
    """
    if not model.startswith(SCHEME):
        folder = user_path(model)
        if not is_adapter(folder):
            raise ModelError(
                f"{model} is neither a registry URI ({SCHEME}NAME@champion) nor an adapter folder with {ADAPTER_JSON}"
            )
        check_sealed_folder(folder)
        yield folder, None
        return
    with tempfile.TemporaryDirectory(prefix="kasa-model-") as temporary:
        files, config = open_registry(workspace).fetch_files(model, Path(temporary))
        folder = files / "artifacts" / ADAPTER
        if not is_adapter(folder):
            raise ModelError(f"{model} is no KaSA model: it was registered without an adapter")
        yield folder, config


def _load_folder(folder: Path, workspace: Path, base: Path | None) -> LoadedModel:
    return load_model(base_of(folder, workspace, base), folder, fast_precision(torch.cuda.is_available()))


def base_of(folder: Path, workspace: Path, base: Path | None) -> Path:
    """The base of the adapter in a folder: the given one, or the recorded one, fetched where it is missing.

    Raises:
        BaseModelError, AdapterFileError: it is missing, or is another one.
    """
    if base is None:
        found = find_base(BaseSettings(model=base_name(folder)), workspace)
        assert found is not None  # only a look without fetching finds nothing
        base = found.folder
    check_saved_base(folder, base)
    return base
