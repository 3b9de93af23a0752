"""Answers from a registered model or an adapter folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from kasa.adapter_file import ADAPTER_JSON
from pipeline.config.settings import BaseSettings
from pipeline.core.errors import ModelError
from pipeline.core.machine import fast_precision
from pipeline.methods.loading import base_name, check_saved_base, is_adapter
from pipeline.models.base import find_base
from pipeline.models.heads import Head
from pipeline.models.prompting import Prompting
from pipeline.registry.store import open_registry
from pipeline.serving.generation import load_answerer
from pipeline.serving.prediction import load_predictor

REGISTRY = "models:/"
DEFAULT_NEW_TOKENS = 64


def answer(
    model: str, prompts: Sequence[str], workspace: Path, base: Path | None, max_new_tokens: int | None
) -> list[str]:
    """Greedy answers of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or an adapter folder; of a model with a head for labels
    the classes or values of the texts, where pairs are parted by ` ||| `.

    Raises:
        ModelError: there is no such model.
        BaseModelError, AdapterFileError: its base is missing, or is another one.
    """
    if model.startswith(REGISTRY):
        return _from_registry(model, prompts, workspace, base, max_new_tokens)
    folder = Path(model)
    if not is_adapter(folder):
        raise ModelError(
            f"{model} is neither a registry URI ({REGISTRY}NAME@champion) nor an adapter folder with {ADAPTER_JSON}"
        )
    found = base or find_base(BaseSettings(model=base_name(folder)), workspace).folder  # type: ignore[union-attr]
    check_saved_base(folder, found)
    head = Head.load(folder)
    precision = fast_precision(torch.cuda.is_available())
    if head.is_new:
        return [str(said) for said in load_predictor(found, folder, precision, head).predictions(prompts)]
    answerer = load_answerer(found, folder, precision, Prompting.load(folder))
    return answerer.answers(prompts, max_new_tokens or DEFAULT_NEW_TOKENS)


def _from_registry(
    uri: str, prompts: Sequence[str], workspace: Path, base: Path | None, max_new_tokens: int | None
) -> list[str]:
    registry = open_registry(workspace)
    if base:
        os.environ["KASA_BASE_MODEL"] = str(base)
    loaded = registry.load_model(uri)
    model = loaded.unwrap_python_model()
    if hasattr(model, "predictor"):
        return [str(said) for said in model.predictor.predictions(prompts)]
    if max_new_tokens:
        model.max_new_tokens = max_new_tokens
    return list(loaded.predict(list(prompts)))
