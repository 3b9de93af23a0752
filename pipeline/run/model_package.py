"""What a model version carries beside its adapter: the LoRA, the evaluation report, tags, and what serving it takes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kasa.errors import InterchangeError
from pipeline.config.recipe import Recipe
from pipeline.core.code import code_tags, package_versions
from pipeline.core.files import ADAPTER, user_path
from pipeline.data.prepared import load_prepared
from pipeline.data.sources import DataSources
from pipeline.evaluation.results import write_samples
from pipeline.metrics.intervals import RESAMPLES
from pipeline.models.base import BaseModel
from pipeline.models.prompting import PROMPTING_FILE, Prompting
from pipeline.registry.store import ModelPackage
from pipeline.run.context import RunContext, seed_tags
from pipeline.run.promotion import Decision, Gate
from pipeline.run.stages.evaluate import Evaluation
from pipeline.storage.artifacts import Artifact

LORA, REPORT = "lora", "evaluation"
PROMOTED, KEPT_OUT = "promoted", "kept out"
PARENT_TAG = "kasa.parent_run"

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = (_ROOT / "kasa", _ROOT / "pipeline")
# What the code that goes along imports when it answers; what else the pipeline needs is not needed there.
SERVING_PACKAGES = (
    "mlflow",
    "torch",
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "safetensors",
    "sentencepiece",
    "numpy",
    "scipy",
    "threadpoolctl",
    "pydantic",
    "pydantic-core",
    "PyYAML",
    "rich",
    "filelock",
    "Jinja2",
)


def gate_of(recipe: Recipe) -> Gate:
    """The bar that the recipe sets."""
    return Gate(recipe.evaluate.gate_metric, recipe.promotion.margin, recipe.promotion.guards)


def write_report(
    folder: Path,
    recipe: Recipe,
    made: Mapping[str, Artifact],
    base: BaseModel,
    evaluation: Evaluation,
    decision: Decision,
) -> str:
    """Fill `lora/` and `evaluation/` of a folder; returns the LoRA's rank in words, or why there is none.

    Raises:
        AdapterFileError: the adapter is damaged.
    """
    report = folder / REPORT
    for left_behind in (report, folder / LORA):
        shutil.rmtree(left_behind, ignore_errors=True)
    (report / "samples").mkdir(parents=True)
    for candidate, records in evaluation.samples.items():
        write_samples(report / "samples" / f"{candidate}.parquet", records)
    measured = {
        "heldout_rows": len(evaluation.samples["adapted"]),
        "metrics": evaluation.metrics,
        "intervals": evaluation.intervals,
        "differences": _plain(evaluation),
        "harness": [dataclasses.asdict(row) for row in evaluation.harness],
        "interval": {"level": 0.95, "method": "paired percentile bootstrap over samples", "resamples": RESAMPLES},
    }
    verdict = {
        **dataclasses.asdict(decision),
        "gate": dataclasses.asdict(gate_of(recipe)),
        "champion": evaluation.champion_version,
        "obstacle": evaluation.obstacle,
    }
    for name, values in (("metrics", measured), ("decision", verdict)):
        (report / f"{name}.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    from kasa import export_lora, read_adapter  # torch
    from pipeline.models.chat_template import chat_files

    adapter = made["train"].folder / ADAPTER
    saved = read_adapter(adapter)
    beside: dict[str, str] = {}
    if recipe.base.head == "language-model":
        beside = chat_files(Prompting.load(adapter), base.folder)
        beside[PROMPTING_FILE] = (adapter / PROMPTING_FILE).read_text(encoding="utf-8")
    name = base.name if not user_path(base.name).is_dir() else str(base.folder)
    try:
        return f"rank {export_lora(saved, folder / LORA, base=name, beside=beside)}"
    except InterchangeError as error:
        return f"none: {error}"


def package_of(
    folder: Path, recipe: Recipe, base: BaseModel, made: Mapping[str, Artifact], with_lora: bool
) -> ModelPackage:
    """The model as MLflow stores it; `folder` holds what `write_report` made."""
    versions = package_versions(SERVING_PACKAGES).items()
    prompts = (prompt for prompt in load_prepared(made["prepare"].folder).heldout["prompt"] if prompt.strip())
    return ModelPackage(
        code=_ROOT / "pipeline" / "serving" / "served_model.py",
        packages=_PACKAGES,
        artifacts={
            ADAPTER: made["train"].folder / ADAPTER,
            REPORT: folder / REPORT,
            **({LORA: folder / LORA} if with_lora else {}),
        },
        config={
            "base_name": base.name,
            "base_revision": recipe.base.revision,
            "base_folder": str(base.folder.resolve()),
            "base_digest": base.digest,
            "head": recipe.base.head,
            "precision": recipe.train.precision,
            "max_new_tokens": recipe.evaluate.max_new_tokens,
        },
        # A local build such as 2.13.0+cpu is in no index.
        requirements=[f"{package}=={version.partition('+')[0]}" for package, version in versions],
        example=next(prompts, "Hello"),
        params={} if recipe.base.head != "language-model" else served_params(recipe.evaluate.max_new_tokens),
    )


def served_params(max_new_tokens: int) -> dict[str, Any]:
    """What a request to a registered language model may set beside its prompts, with its values where it does not: greedy."""
    # MLflow takes the types from these values; of an empty list it would see none.
    return {"max_new_tokens": max_new_tokens, "temperature": 0.0, "top_p": 1.0, "stop": [""]}


def version_tags(
    context: RunContext,
    base: BaseModel,
    sources: DataSources,
    made: Mapping[str, Artifact],
    evaluation: Evaluation,
    decision: Decision,
) -> dict[str, str]:
    """Where the version comes from, what was measured, and the verdict."""
    recipe = context.recipe
    return {
        **{f"kasa.{stage}_key": artifact.key for stage, artifact in made.items()},
        **{f"kasa.{stage}_run": str(artifact.facts["mlflow_run_id"]) for stage, artifact in made.items()},
        PARENT_TAG: context.parent_run,
        "kasa.recipe": recipe.name,
        "kasa.base": base.name,
        "kasa.base_digest": base.digest,
        "kasa.data_digest": sources.digest,
        **seed_tags(recipe),
        **code_tags(),
        "kasa.decision": PROMOTED if decision.promote else KEPT_OUT,
        "kasa.reason": decision.reason,
        "kasa.judged_against": evaluation.champion_version or "",
        "kasa.gate": json.dumps({**dataclasses.asdict(gate_of(recipe)), "against": _plain(evaluation)}),
        **{f"kasa.{name}": f"{value:.6g}" for name, value in evaluation.metrics["adapted"].items()},
    }


def _plain(evaluation: Evaluation) -> dict[str, dict[str, dict[str, float]]]:
    return {
        opponent: {metric: dataclasses.asdict(difference) for metric, difference in differences.items()}
        for opponent, differences in evaluation.differences.items()
    }
