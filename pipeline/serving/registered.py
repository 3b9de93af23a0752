"""Loading a registered model: its adapter is in the registry, its base is not and has to be found and compared.

The registry's code (`served_model`) runs this in processes that have no checkout, so nothing here may need Ray or MLflow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kasa import KasaError, read_adapter
from kasa.adapter_file import check_base
from pipeline.config.settings import BaseSettings
from pipeline.core.errors import ModelError
from pipeline.models.base import BaseModel, find_base
from pipeline.serving.inference import LoadedModel, load_model

BASE_VARIABLE = "KASA_BASE_MODEL"


def load_registered(adapter: Path, config: Mapping[str, Any], base: Path | None = None) -> LoadedModel:
    """Load the adapter of a model version on the base it was trained on.

    Args:
        adapter: the version's adapter folder.
        config: the version's configuration, written by `pipeline.run.model_package`.
        base: where the base is; None looks where `KASA_BASE_MODEL` says, where it was at training, and on the hub.

    Raises:
        ModelError: the base is nowhere to be found, or is another one.
        AdapterFileError: the base's adapted weights are others; the first of them is named.
    """
    found = _find_base(config, base)
    if found.digest != config["base_digest"]:
        check_base(read_adapter(adapter), found.folder)
        raise ModelError(
            f"{found.folder} is not the base model {found.name} that the adapter was trained on: its adapted weights are "
            "the same, but other weights, the configuration or the tokenizer's files differ"
        )
    return load_model(found.folder, adapter, config["precision"])


def _find_base(config: Mapping[str, Any], base: Path | None) -> BaseModel:
    name, recorded = config["base_name"], config["base_folder"]
    given = str(base) if base else os.environ.get(BASE_VARIABLE)
    if given and not _is_model(given):
        option = "--base" if base else BASE_VARIABLE
        raise ModelError(f"{option} is {given}, which is no model folder; it should hold {name}")
    for place in (given, recorded):
        if place and _is_model(place):
            return BaseModel(name, Path(place).resolve())
    try:
        if not is_hub_id(name):
            raise ModelError("it has no hub id")
        found = find_base(BaseSettings(model=name, revision=config["base_revision"]), Path(recorded))
    except KasaError as error:
        raise ModelError(
            f"the base model {name} is not at {recorded} ({error}); set {BASE_VARIABLE} to the folder that holds it"
        ) from None
    assert found is not None  # only a look without fetching finds nothing
    return found


def _is_model(folder: str) -> bool:
    return (Path(folder) / "config.json").is_file()


def is_hub_id(name: str) -> bool:
    """Whether a base's name is `ORGANISATION/NAME` on the hub, not a folder."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/"))
