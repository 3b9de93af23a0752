"""What each stage depends on: pure functions from settings and the keys or digests of inputs to stage keys.

How a thing is computed (how many workers, which ZeRO stage, how often a checkpoint is written) is no part of a key; what
is computed is. A dry run asks these functions what is cached, without making anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa.errors import nearest
from kasa.files import file_digest
from pipeline.artifacts.store import StageKey
from pipeline.config.recipe import Recipe
from pipeline.core.code import code_digests, package_versions
from pipeline.core.errors import RecipeError
from pipeline.metrics.catalogue import optional_packages

if TYPE_CHECKING:
    from kasa.targets import Target

STAGES = ("prepare", "spectra", "audit", "train", "evaluate", "register")
PREPARE, SPECTRA, AUDIT, TRAIN, EVALUATE, REGISTER = STAGES

# Under which name a stage's artifact is an input of another.
STAGE_OF_INPUT = {"prepared": PREPARE, "spectra": SPECTRA, "adapter": TRAIN, "evaluation": EVALUATE}

# Settings that decide where and how fast, not what.
_DATA_PLACES = {"train", "heldout", "calibration"}
_TRAIN_MECHANICS = {
    "workers",
    "min_workers",
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
    # What it comes to is an input.
    "start",
}
_EVALUATE_MECHANICS: Any = {
    **dict.fromkeys(("workers", "batch_size", "metric"), True),
    # What it holds is an input.
    "harness": {"include"},
}


def stages_to_remake(named: Sequence[str], first: str | None) -> list[str]:
    """The stages that `--force` names, and those from `--from` on.

    Raises:
        RecipeError: there is no such stage.
    """
    for stage in [*named, *([first] if first else [])]:
        if stage not in STAGES:
            hint = nearest(stage, STAGES) or f"; choose one of {', '.join(STAGES)}"
            raise RecipeError(f"there is no stage {stage!r}{hint}")
    later = STAGES[STAGES.index(first) :] if first else ()
    return [stage for stage in STAGES if stage in named or stage in later]


def prepare_key(recipe: Recipe, sources_digest: str, base_digest: str) -> StageKey:
    """The data's bytes, how they are read, and the tokenizer."""
    return StageKey(
        PREPARE,
        {
            "settings": {
                "head": recipe.base.head,
                "data": recipe.data.model_dump(mode="json", exclude=_DATA_PLACES),
            },
            "inputs": {"sources": sources_digest, "base": base_digest},
            "code": code_digests(["pipeline.data", "pipeline.models.prompting", "pipeline.models.heads"]),
            "versions": package_versions(["transformers", "tokenizers", "datasets"]),
        },
    )


def spectra_key(recipe: Recipe, base_digest: str, targets: Sequence[Target], prepared: str | None) -> StageKey:
    """The base's bytes, which weights, how many triplets, and the calibration text where the rule looks at one."""
    settings: dict[str, object] = {"rank": recipe.spectra_rank, "targets": [target.name for target in targets]}
    inputs: dict[str, str | None] = {"base": base_digest}
    code = [
        "kasa.spectra",
        "kasa.bottom",
        "kasa.lapack",
        "kasa.spectra_file",
        "kasa.checkpoint",
        "kasa.folders",
        "kasa.files",
    ]
    if recipe.calibrated:
        settings |= {"calibration_tokens": recipe.spectra.calibration_tokens, "precision": recipe.train.precision}
        settings["gradients"] = recipe.weighted == "both"
        inputs["prepared"] = prepared
        code += [
            "kasa.calibration",
            "kasa.weighting",
            "pipeline.spectra.calibration_jobs",
            "pipeline.models.sequence_classification",
        ]
    if recipe.adapter.spec.components == "leading":
        settings["of"] = "corda"
        code.append("pipeline.spectra.decomposition")
    return StageKey(
        SPECTRA,
        {
            "settings": settings,
            "inputs": inputs,
            "code": code_digests(code),
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
            "code": code_digests(
                [
                    "kasa.audit",
                    "kasa.layer",
                    "kasa.truncation",
                    "pipeline.spectra.calibration_jobs",
                    "pipeline.models.sequence_classification",
                ]
            ),
            "versions": package_versions(["torch", "transformers"]),
        },
    )


def inherited_spectra_key(recipe: Recipe, base_digest: str, targets: Sequence[Target], start: str) -> StageKey:
    """What the adapter of the training `start` drops, read from the adapter itself."""
    return StageKey(
        SPECTRA,
        {
            "settings": {"targets": [target.name for target in targets], "dropped_rank": recipe.dropped_rank},
            "inputs": {"base": base_digest, "champion": start},
            "code": code_digests(["kasa.spectra", "kasa.spectra_file", "pipeline.spectra.decomposition"]),
            "versions": package_versions(["torch"]),
        },
    )


def train_key(recipe: Recipe, prepared: str, spectra: str | None, start: str | None = None) -> StageKey:
    """The prepared data, every hyperparameter of the method, and the spectra, where there are any, or the training that is
    gone on from, which has them."""
    spec = recipe.adapter.spec
    adapter = recipe.adapter.model_dump(mode="json", include={"method", *spec.settings})
    origin = {"champion": start} if start else {} if spectra is None else {"spectra": spectra}
    code = [
        "kasa",
        "pipeline.training",
        "pipeline.models.language_model",
        "pipeline.models.sequence_classification",
        "pipeline.models.loading",
    ]
    code += [spec.module, "pipeline.methods.peft", "pipeline.training.layers"]
    versions = ["torch", "transformers", "deepspeed", "peft"]
    return StageKey(
        TRAIN,
        {
            "settings": {
                "adapter": adapter,
                "train": recipe.train.model_dump(mode="json", exclude=_TRAIN_MECHANICS),
            },
            "inputs": {"prepared": prepared, **origin},
            "code": code_digests(code),
            "versions": package_versions(versions),
        },
    )


def evaluation_key(recipe: Recipe, prepared: str, base_digest: str, adapter: str | None) -> StageKey:
    """One candidate on the held-out samples: the plain base where `adapter` is None."""
    return StageKey(
        EVALUATE,
        {
            "settings": {
                "evaluate": recipe.evaluate.model_dump(mode="json", exclude=_EVALUATE_MECHANICS),
                "precision": recipe.train.precision,
                # What an untrained head says depends on it.
                **({"seed": recipe.train.seed} if recipe.base.head != "language-model" and adapter is None else {}),
            },
            "inputs": {
                "prepared": prepared,
                "base": base_digest,
                "adapter": adapter,
                "harness": _harness_files(recipe),
            },
            "code": code_digests(
                [
                    "pipeline.evaluation",
                    "pipeline.metrics",
                    "pipeline.serving.generation",
                    "pipeline.models.language_model",
                    "pipeline.serving.prediction",
                    "pipeline.models.sequence_classification",
                    "pipeline.methods.loading",
                    "kasa.layer",
                ]
            ),
            "versions": package_versions(
                ["torch", "transformers", "sacrebleu", "rouge-score", *_optional_packages(recipe)]
            ),
        },
    )


def _optional_packages(recipe: Recipe) -> list[str]:
    # A dry run may be asked for where they are not installed.
    packages = optional_packages(recipe.evaluate.measured)
    return packages + (["lm_eval"] if recipe.evaluate.harness.tasks and find_spec("lm_eval") else [])


def _harness_files(recipe: Recipe) -> dict[str, str]:
    """Digests of the task files of the user's own."""
    include = recipe.evaluate.harness.include
    files = sorted(Path(include).rglob("*")) if recipe.evaluate.harness.tasks and include else []
    return {file.relative_to(include).as_posix(): file_digest(file) for file in files if file.is_file()}  # type: ignore[arg-type]


def register_key(recipe: Recipe, trained: str, evaluated: str, registry: str) -> StageKey:
    """One adapter with its evaluation and the bar it is held to, under one name in one registry.

    The champion is no part of it: a verdict is given once, and what people do with the aliases later stands.
    """
    return StageKey(
        REGISTER,
        {
            "settings": {
                "name": recipe.registered_name,
                "registry": registry,
                "metric": recipe.evaluate.gate_metric,
                "promotion": recipe.promotion.model_dump(mode="json"),
            },
            "inputs": {"adapter": trained, "evaluation": evaluated},
            "code": code_digests(
                [
                    "pipeline.serving.served_model",
                    "pipeline.serving.served_labels",
                    "pipeline.serving.served_base",
                    "pipeline.run.promotion",
                ]
            ),
            "versions": package_versions(["mlflow"]),
        },
    )


def code_state(recipe: Recipe) -> dict[str, Any]:
    """The code and the versions that matter to each stage of the recipe: what its key depends on beside settings and
    inputs."""
    stages = (
        prepare_key(recipe, "", ""),
        spectra_key(recipe, "", (), ""),
        audit_key(recipe, "", ""),
        train_key(recipe, "", ""),
        evaluation_key(recipe, "", "", ""),
        register_key(recipe, "", "", ""),
    )
    return {key.stage: [key.ingredients["code"], key.ingredients["versions"]] for key in stages}
