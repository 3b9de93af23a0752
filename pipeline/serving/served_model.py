"""The registered model as code: MLflow runs this file when `models:/NAME@ALIAS` is loaded, so nothing is pickled.

The packages that it imports from here lie beside it in the registry; the base model does not (`registered` finds it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from kasa import KasaError
from kasa.files import check_sealed_folder
from pipeline.core.errors import ModelError
from pipeline.models.prompting import LANGUAGE_MODEL
from pipeline.serving.inference import load_registered
from pipeline.serving.requests import Decoding, read_request


class ServedModel(PythonModel):
    """A base model with its adapter behind MLflow's interface.

    Attributes:
        served: the loaded model.
        max_new_tokens: length limit of generated answers, where a request sets none.
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
    """Input: prompts, as a person types them, or conversations: lists of messages, or objects with `messages`. Output: answers.
    `params` are `max_new_tokens`, `temperature`, `top_p` and `stop` (a list of texts, of which empty ones do not count);
    greedy without them."""

    def predict(
        self,
        context: PythonModelContext,
        model_input: list[str | dict[str, Any] | list[dict[str, Any]]],
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """One answer for each request.

        Raises:
            MlflowException: a request or a parameter is not what it should be; servers answer 400.
        """
        chosen = dict(params or {})
        try:
            limit = chosen.pop("max_new_tokens", self.max_new_tokens)
            if limit < 1:
                raise ModelError(f"max_new_tokens is {limit}; it is at least 1")
            decoding = Decoding(**chosen | {"stop": tuple(filter(None, chosen.get("stop", ())))})
            return self.served.answers([read_request(one) for one in model_input], limit, decoding)
        except KasaError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


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
