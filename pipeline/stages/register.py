"""Stage 5: a new version in the model registry; `@champion` only if it beats the base and the champion before it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, package_versions
from pipeline.base_model import BaseModel
from pipeline.context import RunContext
from pipeline.keys import register_key
from pipeline.prepare.sources import DataSources
from pipeline.promotion import Decision, decide
from pipeline.stages.evaluate import Evaluation
from pipeline.tracking import CHAMPION, ModelVersion
from pipeline.training.worker import ADAPTER

# What a serving environment needs beside this package.
_SERVING_PACKAGES = ("torch", "transformers", "safetensors", "mlflow")


@dataclass(frozen=True)
class Registration:
    """The version and the verdict on it."""

    model: ModelVersion
    decision: Decision

    @property
    def uri(self) -> str:
        """How to load it: by alias where it is the champion, else by number."""
        return f"models:/{self.model.name}@{CHAMPION}" if self.decision.promote else self.model.uri


def register(
    context: RunContext,
    base: BaseModel,
    sources: DataSources,
    prepared: Artifact,
    trained: Artifact,
    evaluation: Evaluation,
) -> Registration:
    """Register the adapter and decide on its promotion; both happen once for one adapter and evaluation."""
    recipe, tracking = context.recipe, context.tracking
    metric = recipe.evaluate.gate_metric

    def make(folder: Path) -> dict[str, Any]:
        against = {name: differences[metric] for name, differences in evaluation.differences.items()}
        decision = decide(metric, against, evaluation.obstacle)
        tags = {
            "kasa.train_key": trained.key,
            "kasa.prepare_key": prepared.key,
            "kasa.evaluation_key": evaluation.artifact.key,
            "kasa.base": base.name,
            "kasa.base_digest": base.digest,
            "kasa.data_digest": sources.digest,
            "kasa.decision": "promoted" if decision.promote else "kept out",
            "kasa.reason": decision.reason,
            **{f"kasa.{name}": f"{value:.6g}" for name, value in evaluation.metrics["adapted"].items()},
        }
        model = tracking.register(
            run_id=context.children["register"],
            name=recipe.registered_name,
            code=Path(__file__).parents[1] / "served_model.py",
            artifacts={ADAPTER: str(trained.folder / ADAPTER)},
            config={
                "base_name": base.name,
                "base_folder": str(base.folder.resolve()),
                "precision": recipe.train.precision,
                "max_new_tokens": recipe.evaluate.max_new_tokens,
                "versions": package_versions(_SERVING_PACKAGES),
            },
            tags=tags,
        )
        if decision.promote:
            tracking.set_alias(model, CHAMPION)
        return {"name": model.name, "version": model.version, "promote": decision.promote, "reason": decision.reason}

    def publish(run_id: str, artifact: Artifact) -> None:
        facts = artifact.facts
        tracking.log_parameters(run_id, {"model": facts["name"], "version": facts["version"], "metric": metric})
        tracking.tag(run_id, {"kasa.decision": json.dumps({"promote": facts["promote"], "reason": facts["reason"]})})

    key = register_key(recipe, trained.key, evaluation.artifact.key, tracking.uri)
    known = context.store.find(key)
    if known and not tracking.has_version(known.facts["name"], known.facts["version"]):
        context.store.remove(known)
    facts = context.run_stage(key, make, publish).facts
    model = ModelVersion(facts["name"], facts["version"], {})
    return Registration(model, Decision(facts["promote"], facts["reason"]))
