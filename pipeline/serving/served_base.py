"""The base of a registered model, which is not stored with it: found again, and checked, where the model is loaded."""

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


def find_served_base(config: Mapping[str, Any]) -> BaseModel:
    """The base that a registered model with this configuration belongs to.

    Raises:
        ModelError: it is nowhere to be found.
    """
    name = config["base_name"]
    for place in (os.environ.get("KASA_BASE_MODEL"), config["base_folder"]):
        if place and (Path(place) / "config.json").is_file():
            return BaseModel(name, Path(place).resolve())
        if place and place == os.environ.get("KASA_BASE_MODEL"):
            raise ModelError(f"KASA_BASE_MODEL is {place}, which is no model folder; it should hold {name}")
    try:
        if name.count("/") != 1 or name.startswith((".", "~", "/")):
            raise ModelError("it has no hub id")
        found = find_base(BaseSettings(model=name, revision=config["base_revision"]), Path(config["base_folder"]))
    except KasaError as error:
        raise ModelError(
            f"the base model {name} is not at {config['base_folder']} ({error}); set KASA_BASE_MODEL to the folder that "
            "holds it"
        ) from None
    assert found is not None
    return found


def check_served_base(base: BaseModel, adapter: Path, config: Mapping[str, Any]) -> None:
    """Refuse another base than that of the training.

    Raises:
        ModelError, AdapterFileError: it is another one; the first weight that differs is named.
    """
    if base.digest == config["base_digest"]:
        return
    check_base(read_adapter(adapter), base.folder)  # names the weight that differs, where it is one of the adapter's
    raise ModelError(
        f"{base.folder} is not the base model {base.name} that the adapter was trained on: its adapted weights are the "
        "same, but other weights, the configuration or the tokenizer's files differ"
    )
