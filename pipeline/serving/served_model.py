"""The registered model, stored as code: MLflow runs this file when `models:/NAME@ALIAS` is loaded (no pickle).

Input: prompts, as a person types them. Output: answers. The packages it needs from here lie beside it in the registry; the
base model does not. That is found at KASA_BASE_MODEL, where it was at training, or on the hub, and checked to be the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.models.prompting import Prompting
from pipeline.serving.generation import load_answerer
from pipeline.serving.served_base import check_served_base, find_served_base


class KasaModel(PythonModel):
    """A base model with its KaSA adapter behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Find the base, check it, attach the adapter."""
        config = context.model_config
        adapter = Path(context.artifacts["adapter"])
        base = find_served_base(config)
        check_served_base(base, adapter, config)
        self.answerer = load_answerer(base.folder, adapter, config["precision"], Prompting.load(adapter))
        self.max_new_tokens = int(config["max_new_tokens"])

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Greedy answers."""
        return self.answerer.answers(list(model_input), self.max_new_tokens)


mlflow.models.set_model(KasaModel())
