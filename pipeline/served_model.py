"""The registered model, stored as code: MLflow runs this file when `models:/NAME@ALIAS` is loaded (no pickle).

Input: prompts, as a person types them. Output: answers. The base model is not copied into the registry; it is found where
it was at training, or at KASA_BASE_MODEL, and checked to be the same weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from kasa import read_adapter
from kasa.adapter_file import check_base
from pipeline.errors import ModelError
from pipeline.generation import load_answerer
from pipeline.prompting import Prompting


class KasaModel(PythonModel):
    """A base model with its KaSA adapter behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Find the base, check it, attach the adapter."""
        config = context.model_config
        adapter = Path(context.artifacts["adapter"])
        base = Path(os.environ.get("KASA_BASE_MODEL") or config["base_folder"])
        if not base.is_dir():
            raise ModelError(
                f"the base model {config['base_name']} is not at {base}; set KASA_BASE_MODEL to the folder that holds it"
            )
        check_base(read_adapter(adapter), base)
        self.answerer = load_answerer(base, adapter, config["precision"], Prompting.load(adapter))
        self.max_new_tokens = int(config["max_new_tokens"])

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Greedy answers."""
        return self.answerer.answers(list(model_input), self.max_new_tokens)


mlflow.models.set_model(KasaModel())
