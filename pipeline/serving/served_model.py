"""The registered model as code: MLflow runs this file when `models:/NAME@ALIAS` is loaded, so nothing is pickled.

The packages that it imports from here lie beside it in the registry; the base model does not (`registered` finds it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from kasa.files import check_sealed_folder
from pipeline.models.prompting import LANGUAGE_MODEL
from pipeline.serving.inference import load_registered


class ServedModel(PythonModel):
    """A base model with its adapter behind MLflow's interface.

    Attributes:
        served: the loaded model.
        max_new_tokens: length limit of generated answers.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Compare the version's files with what was registered, find the base, check it, attach the adapter.

        Raises:
            DamagedFileError: a file of the version was changed.
        """
        adapter = Path(context.artifacts["adapter"])
        check_sealed_folder(adapter.parents[1], must_be_sealed=True)
        self.served = load_registered(adapter, context.model_config)
        self.max_new_tokens = int(context.model_config["max_new_tokens"])


class TextModel(ServedModel):
    """Input: prompts, as a person types them. Output: answers."""

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Greedy answers."""
        return self.served.answers(list(model_input), self.max_new_tokens)


class LabelModel(ServedModel):
    """Input: texts, those of a pair joined by ` ||| `. Output: `label` (a class by name) and the `probabilities` of all
    classes for each text, or the `value` of a regression."""

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Labels with probabilities, or values."""
        return [
            {"label": one.label, "probabilities": one.probabilities} if one.probabilities else {"value": one.label}
            for one in self.served.predictions(list(model_input))
        ]


# MLflow takes the signature from the type hints of `predict` when the version is logged, before it has loaded anything. So the
# configuration says which class this is, and not the adapter's `head.json`, which decides how the model is loaded.
_config = mlflow.models.ModelConfig(development_config={"head": LANGUAGE_MODEL.kind}).to_dict()
mlflow.models.set_model(TextModel() if _config["head"] == LANGUAGE_MODEL.kind else LabelModel())
