"""What each stage depends on: pure functions from settings and the keys or digests of inputs to stage keys.

How a thing is computed (how many workers, which ZeRO stage, how often a checkpoint is written) is no part of a key; what
is computed is. A dry run asks these functions what is cached, without making anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from kasa.targets import Target
from pipeline.artifacts import StageKey, code_digest, package_versions
from pipeline.recipe import Recipe

STAGES = ("prepare", "spectra", "audit", "train", "evaluate", "register")
PREPARE, SPECTRA, AUDIT, TRAIN, EVALUATE, REGISTER = STAGES

# Settings that decide where and how fast, not what.
_DATA_PLACES = {"train", "heldout", "calibration"}
_TRAIN_MECHANICS = {
    "workers",
    "gpu",
    "cpus_per_worker",
    "deepspeed",
    "micro_batch_size",
    "pack_tokens",
    "gradient_checkpointing",
    "checkpoint_every",
    "checkpoints_kept",
    "max_failures",
    "collective_timeout_s",
}
_EVALUATE_MECHANICS = {"workers", "batch_size", "metric"}


def prepare_key(recipe: Recipe, sources_digest: str, base_digest: str) -> StageKey:
    """The data's bytes, how they are read, and the tokenizer."""
    return StageKey(
        PREPARE,
        {
            "settings": recipe.data.model_dump(mode="json", exclude=_DATA_PLACES),
            "inputs": {"sources": sources_digest, "base": base_digest},
            "code": code_digest(["pipeline.prepare", "pipeline.prompting"]),
            "versions": package_versions(["transformers", "tokenizers", "datasets"]),
        },
    )


def spectra_key(recipe: Recipe, base_digest: str, targets: Sequence[Target], prepared: str) -> StageKey:
    """The base's bytes, which weights, how many triplets, and the calibration text where the rule looks at one."""
    settings: dict[str, object] = {"rank": recipe.spectra_rank, "targets": [target.name for target in targets]}
    inputs = {"base": base_digest}
    code = ["kasa.spectra", "kasa.bottom", "kasa.lapack", "kasa.spectra_file", "kasa.checkpoint", "kasa.folders"]
    if recipe.calibrated:
        settings |= {"calibration_tokens": recipe.spectra.calibration_tokens, "precision": recipe.train.precision}
        settings["gradients"] = recipe.adapter.truncation == "loss"
        inputs["prepared"] = prepared
        code += ["kasa.calibration", "kasa.weighting", "pipeline.truncation"]
    return StageKey(
        SPECTRA,
        {
            "settings": settings,
            "inputs": inputs,
            "code": code_digest(code),
            "versions": package_versions(["torch", "numpy", "scipy"]),
        },
    )


def audit_key(recipe: Recipe, prepared: str, spectra: str) -> StageKey:
    """What is dropped, and the held-out text."""
    return StageKey(
        AUDIT,
        {
            "settings": {
                "truncation": recipe.adapter.truncation,
                "dropped_rank": recipe.dropped_rank,
                "tokens": recipe.spectra.audit_tokens,
                "precision": recipe.train.precision,
            },
            "inputs": {"prepared": prepared, "spectra": spectra},
            "code": code_digest(["kasa.audit", "kasa.layer", "kasa.truncation", "pipeline.truncation"]),
            "versions": package_versions(["torch", "transformers"]),
        },
    )


def train_key(recipe: Recipe, prepared: str, spectra: str) -> StageKey:
    """The prepared data, the spectra, and every hyperparameter."""
    return StageKey(
        TRAIN,
        {
            "settings": {
                "adapter": recipe.adapter.model_dump(mode="json"),
                "train": recipe.train.model_dump(mode="json", exclude=_TRAIN_MECHANICS),
            },
            "inputs": {"prepared": prepared, "spectra": spectra},
            "code": code_digest(["kasa", "pipeline.training", "pipeline.language_model"]),
            "versions": package_versions(["torch", "transformers", "deepspeed"]),
        },
    )


def evaluation_key(recipe: Recipe, prepared: str, base_digest: str, adapter: str | None) -> StageKey:
    """One candidate on the held-out samples: the plain base where `adapter` is None."""
    return StageKey(
        EVALUATE,
        {
            "settings": {
                **recipe.evaluate.model_dump(mode="json", exclude=_EVALUATE_MECHANICS),
                "precision": recipe.train.precision,
            },
            "inputs": {"prepared": prepared, "base": base_digest, "adapter": adapter},
            "code": code_digest(
                ["pipeline.evaluation", "pipeline.generation", "pipeline.language_model", "kasa.layer"]
            ),
            "versions": package_versions(["torch", "transformers", "sacrebleu", "rouge-score"]),
        },
    )


def register_key(recipe: Recipe, trained: str, evaluated: str, registry: str) -> StageKey:
    """One adapter with its evaluation, under one name in one registry."""
    return StageKey(
        REGISTER,
        {
            "settings": {"name": recipe.registered_name, "registry": registry, "metric": recipe.evaluate.gate_metric},
            "inputs": {"adapter": trained, "evaluation": evaluated},
            "code": code_digest(["pipeline.served_model", "pipeline.promotion"]),
            "versions": package_versions(["mlflow"]),
        },
    )
