"""The registered model with a head for labels, stored as code like `served_model`.

Input: texts, those of a pair parted by ` ||| `. Output: for each its `label`, a class by name, and the `probabilities` of all
classes; of a regression the `value`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.models.heads import Head
from pipeline.serving.prediction import load_predictor
from pipeline.serving.served_base import check_served_base, find_served_base


class LabelModel(PythonModel):
    """A base model with its adapter and trained head behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Find the base, check it, attach adapter and head."""
        config = context.model_config
        adapter = Path(context.artifacts["adapter"])
        base = find_served_base(config)
        check_served_base(base, adapter, config)
        self.predictor = load_predictor(base.folder, adapter, config["precision"], Head.load(adapter))

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Labels with probabilities, or values."""
        return [
            {"label": said.label, "probabilities": said.probabilities} if said.probabilities else {"value": said.label}
            for said in self.predictor.predictions(list(model_input))
        ]


mlflow.models.set_model(LabelModel())
