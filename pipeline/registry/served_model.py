"""The registered model, stored as code: MLflow runs this file when `models:/NAME@ALIAS` is loaded (no pickle).

Input: prompts, as a person types them. Output: answers. The packages it needs from here lie beside it in the registry; the
base model does not. That is found at KASA_BASE_MODEL, where it was at training, or on the hub, and checked to be the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from kasa import KasaError, read_adapter
from kasa.adapter_file import check_base
from pipeline.base.model import BaseModel, find_base
from pipeline.errors import ModelError
from pipeline.generation import load_answerer
from pipeline.prompting import Prompting
from pipeline.settings import BaseSettings


class KasaModel(PythonModel):
    """A base model with its KaSA adapter behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Find the base, check it, attach the adapter."""
        config = context.model_config
        adapter = Path(context.artifacts["adapter"])
        base = _find_base(config)
        _check_digest(base, adapter, config)
        self.answerer = load_answerer(base.folder, adapter, config["precision"], Prompting.load(adapter))
        self.max_new_tokens = int(config["max_new_tokens"])

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Greedy answers."""
        return self.answerer.answers(list(model_input), self.max_new_tokens)


def _find_base(config: Mapping[str, Any]) -> BaseModel:
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


def _check_digest(base: BaseModel, adapter: Path, config: Mapping[str, Any]) -> None:
    if base.digest == config["base_digest"]:
        return
    check_base(read_adapter(adapter), base.folder)  # names the weight that differs, where it is one of the adapter's
    raise ModelError(
        f"{base.folder} is not the base model {base.name} that the adapter was trained on: its adapted weights are the "
        "same, but other weights, the configuration or the tokenizer's files differ"
    )


mlflow.models.set_model(KasaModel())
