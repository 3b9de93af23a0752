"""The stage graph: what each stage is made from, what runs in it, and in which order; each stage is described once.

    base + data ── prepare ── spectra ── audit ── train ── evaluate ── register

`kasa run`, `--dry-run`, `kasa compare`, `kasa retrain` and `kasa artifacts` all interpret this graph. A stage is
content-addressed: its key is made from the settings that count, the keys or digests of its inputs, and the code and the
package versions that it runs. How a thing is computed (how many workers, which ZeRO stage, how often a checkpoint is
written) is no part of a key; what is computed is. All of this is found out without making or importing anything.

A new stage is a module `pipeline/run/stages/NAME.py`, with a function NAME, and an entry in `GRAPH`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kasa.errors import nearest
from kasa.files import file_digest
from pipeline.config.deepspeed import load_deepspeed_config
from pipeline.config.recipe import Recipe
from pipeline.config.section import Section
from pipeline.core.code import code_digests, package_versions
from pipeline.core.errors import RecipeError
from pipeline.data.own_form import is_own, own_form_digest
from pipeline.metrics.catalogue import optional_packages
from pipeline.run.dependencies import REGISTER, Dependencies, KeyInputs, Stage
from pipeline.storage.artifacts import StageKey

PREPARE, SPECTRA, AUDIT, TRAIN, EVALUATE = "prepare", "spectra", "audit", "train", "evaluate"

# Settings that decide where and how fast, not what.
_DATA_PLACES = {"train", "heldout", "calibration"}
_TRAIN_MECHANICS = {
    "workers",
    "min_workers",
    "fewest_workers",
    "gpu",
    "cpus_per_worker",
    "deepspeed",  # but see `_inexact_settings`
    "micro_batch_size",
    "pack_tokens",
    "gradient_checkpointing",
    "checkpoint_every",
    "checkpoints_kept",
    "max_failures",
    "collective_timeout_s",
    "start",  # what it comes to is an input
}
# How a global batch is dealt out to workers and passes. Random numbers are drawn for each pass, so with dropout it counts.
_DEALING = {"workers", "micro_batch_size", "pack_tokens"}
_EVALUATE_MECHANICS = {
    "workers",
    "batch_size",
    "metric",  # which of the measured ones decides: an ingredient of `register`
    "gate_metric",
    "harness",  # but for where its files lie: see `_harness_files`
}


def _prepare(known: KeyInputs) -> Dependencies:
    """The data's bytes, how they are read, and the tokenizer."""
    recipe = known.recipe
    own = {"form": own_form_digest(recipe.data.form)} if is_own(recipe.data.form) else {}
    return Dependencies(
        settings={"head": recipe.base.head, "data": _values(recipe.data, _DATA_PLACES)},
        code=["pipeline.data.prepare"],
        # How many tokens the base can read.
        driver=["pipeline.models.base"],
        packages=["transformers", "tokenizers", "datasets"],
        digests={"sources": known.sources, "base": known.base, **own},
    )


def _spectra(known: KeyInputs) -> Dependencies | None:
    """The base's bytes, which weights, how many triplets, and the calibration text where the rule looks at one."""
    recipe = known.recipe
    if not known.trains or not recipe.decomposes:
        return None
    if known.champion:
        # What the adapter of that training drops, read from the adapter itself.
        return Dependencies(
            settings={"targets": known.target_names, "dropped_rank": recipe.dropped_rank},
            code=["pipeline.spectra.decomposition", "kasa.adapter_file"],
            packages=["torch"],
            digests={"base": known.base, "champion": known.champion},
        )
    settings: dict[str, Any] = {"rank": recipe.spectra_rank, "targets": known.target_names}
    code = ["pipeline.spectra.decomposition"]
    if recipe.adapter.spec.components == "leading":  # the largest triplets, not the smallest
        settings["of"] = "corda"
    if recipe.calibrated:
        settings |= {"calibration_tokens": recipe.spectra.calibration_tokens, "precision": recipe.train.precision}
        settings["gradients"] = recipe.weighted == "both"
        code.append("pipeline.spectra.calibration")
    return Dependencies(
        settings=settings,
        code=code,
        packages=["torch", "numpy", "scipy"],
        stages=[PREPARE] if recipe.calibrated else [],
        digests={"base": known.base},
    )


def _audit(known: KeyInputs) -> Dependencies | None:
    """What is dropped, and the held-out text."""
    recipe = known.recipe
    if not known.trains or not recipe.dropped_rank:
        return None
    return Dependencies(
        settings={
            "truncation": recipe.adapter.truncation,
            "dropped_rank": recipe.dropped_rank,
            "tokens": recipe.spectra.audit_tokens,
            "precision": recipe.train.precision,
        },
        code=["pipeline.spectra.audit"],
        packages=["torch", "transformers"],
        stages=[PREPARE, SPECTRA],
    )


def _train(known: KeyInputs) -> Dependencies | None:
    """The prepared data, every hyperparameter of the method, and the spectra, where there are any, or the training that
    this one starts from, which has them."""
    if not known.trains:
        return None
    recipe, spec = known.recipe, known.recipe.adapter.spec
    has_spectra = _spectra(known) is not None
    return Dependencies(
        settings={
            "adapter": _adapter(known),
            "train": _values(recipe.train, _TRAIN_MECHANICS - (_DEALING if _drops(known) else set())),
            **_inexact_settings(recipe),
        },
        code=["pipeline.training.worker", spec.module],
        # Builds the method from the recipe.
        driver=["pipeline.methods.choice"],
        packages=["torch", "transformers", "deepspeed", *([] if spec.components == "dropped" else ["peft"])],
        stages=[PREPARE, *([SPECTRA] if has_spectra and not known.champion else [])],
        digests={"champion": known.champion} if known.champion else {},
        beside=[SPECTRA] if has_spectra and known.champion else [],
    )


def _drops(known: KeyInputs) -> bool:
    """Whether training drops activations at random, in the adapter's inputs or in the base."""
    adapter = known.recipe.adapter
    return known.base_drops or ("dropout" in adapter.spec.settings and adapter.dropout > 0)


def _adapter(known: KeyInputs) -> dict[str, Any]:
    """What the method has a use for of the adapter's settings."""
    recipe, spec = known.recipe, known.recipe.adapter.spec
    if spec.components == "dropped":
        # In the terms of the method library: what the recipe comes to counts, not how it says so.
        adapter = {"method": spec.name} | asdict(recipe.kasa_config)
    else:
        # What is derived is derived from the rank.
        derived = _derived(recipe.adapter) if "rank" in spec.settings else {}
        adapter = recipe.adapter.model_dump(mode="json", include={"method", *spec.settings}) | derived
    return adapter | ({"targets": known.target_names} if "targets" in spec.settings else {})


def _evaluate(known: KeyInputs) -> Dependencies | None:
    """One candidate on the held-out samples: the plain base where there is no adapter."""
    if known.until == TRAIN:
        return None
    recipe = known.recipe
    has_untrained_head = recipe.base.head != "language-model" and not known.trains
    harness = recipe.evaluate.harness
    return Dependencies(
        settings={
            # With `measured`, the metrics that the kind of evaluation comes to.
            "evaluate": _values(recipe.evaluate, _EVALUATE_MECHANICS)
            | {"harness": harness.model_dump(mode="json", exclude={"include"})},
            "precision": recipe.train.precision,
            # What an untrained head says depends on it.
            **({"seed": recipe.train.seed} if has_untrained_head else {}),
        },
        code=[
            "pipeline.evaluation.worker",
            "pipeline.evaluation.results",
            "pipeline.metrics.intervals",
            *(["pipeline.evaluation.harness"] if harness.tasks else []),
        ],
        packages=["torch", "transformers", "sacrebleu", "rouge-score", *_optional_packages(recipe)],
        stages=[PREPARE, *([TRAIN] if known.trains else [])],
        digests={"base": known.base, "harness": _harness_files(recipe), **({} if known.trains else {"adapter": None})},
    )


def _register(known: KeyInputs) -> Dependencies | None:
    """One adapter with its evaluation and the bar it is held to, under one name in one registry.

    The champion is no part of it: a verdict is given once, and what people do with the aliases later stands.
    """
    if not known.registers:
        return None
    recipe = known.recipe
    return Dependencies(
        settings={
            "name": recipe.registered_name,
            "registry": known.registry,
            "metric": recipe.evaluate.gate_metric,
            "promotion": recipe.promotion.model_dump(mode="json"),
        },
        code=["pipeline.run.promotion", "pipeline.serving.served_model"],
        driver=["pipeline.run.model_package"],
        packages=["mlflow"],
        stages=[TRAIN, EVALUATE],
    )


def _one_worker(recipe: Recipe) -> tuple[float, int]:
    return 1, int(recipe.train.gpu)


def _fewest_training_workers(recipe: Recipe) -> tuple[float, int]:
    workers = recipe.train.fewest_workers
    return workers * recipe.train.cpus_per_worker, workers if recipe.train.gpu else 0


def _evaluation_workers(recipe: Recipe) -> tuple[float, int]:
    return recipe.evaluate.workers, recipe.evaluate.workers if recipe.train.gpu else 0


# In the order in which they are shown, and run where they share an input.
GRAPH = (
    Stage(PREPARE, "prepared", _prepare, _one_worker),
    Stage(SPECTRA, "spectra", _spectra, _one_worker),
    Stage(AUDIT, "audit", _audit, _one_worker),
    # The audit's warning comes before hours of training.
    Stage(TRAIN, "adapter", _train, _fewest_training_workers, after=[AUDIT]),
    Stage(EVALUATE, "evaluation", _evaluate, _evaluation_workers),
    Stage(REGISTER, "version", _register, _one_worker),
)
STAGE = {stage.name: stage for stage in GRAPH}
STAGES = tuple(STAGE)
# Under which name a stage's artifact is an input of another.
STAGE_OF_INPUT = {stage.artifact: stage.name for stage in GRAPH}


def stage_key(stage: Stage, inputs: KeyInputs, made: Mapping[str, str]) -> StageKey:
    """The key of what the stage makes from artifacts of the keys `made`, by stage."""
    depends = stage.depends(inputs)
    assert depends is not None
    return StageKey(
        stage.name,
        {
            "settings": depends.settings,
            "inputs": {STAGE[name].artifact: made[name] for name in depends.stages} | dict(depends.digests),
            # The stage's own module builds the jobs from the recipe and puts their results together.
            "code": code_digests(depends.code, alone=[stage.module, *depends.driver]),
            "versions": package_versions(depends.packages),
        },
    )


def stage_keys(inputs: KeyInputs) -> dict[str, StageKey]:
    """The key of each stage that such a run needs, in the order of the graph."""
    keys: dict[str, StageKey] = {}
    for stage in GRAPH:
        if stage.depends(inputs) is not None:
            made = {name: key.key for name, key in keys.items()}
            keys[stage.name] = inputs.taken_over.get(stage.name) or stage_key(stage, inputs, made)
    return keys


def side_by_side(inputs: KeyInputs) -> list[list[Stage]]:
    """The stages of such a run, those together of which none needs another."""
    groups: list[list[Stage]] = []
    for stage in GRAPH:
        depends = stage.depends(inputs)
        if depends is None:
            continue
        waits_for = {*depends.stages, *depends.beside, *stage.after}
        if groups and waits_for.isdisjoint(one.name for one in groups[-1]):
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def code_state(recipe: Recipe) -> dict[str, Any]:
    """The code and the versions that matter to each stage of a run of the recipe: what its key depends on beside settings
    and inputs."""
    keys = stage_keys(KeyInputs(recipe))
    return {stage: [key.ingredients["code"], key.ingredients["versions"]] for stage, key in keys.items()}


def needed_resources(recipe: Recipe) -> tuple[float, int]:
    """CPU cores and GPUs that the hungriest stage reserves at once, with as few training workers as will do."""
    cores, gpus = zip(*(stage.reserves(recipe) for stage in GRAPH), strict=True)
    return max(cores), max(gpus)


def stages_to_recompute(named: Iterable[str], first: str | None) -> list[str]:
    """The stages that `--force` names, and those from `--from` on.

    Raises:
        RecipeError: there is no such stage.
    """
    named = list(named)
    for stage in [*named, *([first] if first else [])]:
        if stage not in STAGES:
            hint = nearest(stage, STAGES) or f"; choose one of {', '.join(STAGES)}"
            raise RecipeError(f"there is no stage {stage!r}{hint}")
    later = STAGES[STAGES.index(first) :] if first else ()
    return [stage for stage in STAGES if stage in named or stage in later]


def _values(section: Section, without: set[str]) -> dict[str, Any]:
    """A section's settings and what it derives from them."""
    derived = {name: value for name, value in _derived(section).items() if name not in without}
    return section.model_dump(mode="json", exclude=without) | derived


def _derived(section: Section) -> dict[str, Any]:
    """The JSON values that a section derives from its settings: with them in a key, a change of that derivation is seen."""
    names = [name for name, value in vars(type(section)).items() if isinstance(value, property)]
    values = {name: getattr(section, name) for name in names}
    # A manifest is read back with lists where there were tuples, and compared (`pipeline.run.lineage`).
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str, list))}


def _inexact_settings(recipe: Recipe) -> dict[str, Any]:
    """Settings of the DeepSpeed file that do more than to decide where tensors lie: quantisation, types, scaling.

    ZeRO stages, buckets and offloading give the same adapter up to rounding, so the file itself does not count.
    """
    config = load_deepspeed_config(recipe.train.deepspeed)
    zero = config.pop("zero_optimization", {})
    found = config | {name: value for name, value in zero.items() if "quantized" in name}
    return {"deepspeed": found} if found else {}


def _optional_packages(recipe: Recipe) -> list[str]:
    # A dry run may be asked for where they are not installed.
    packages = optional_packages(recipe.evaluate.measured)
    return packages + (["lm_eval"] if recipe.evaluate.harness.tasks and find_spec("lm_eval") else [])


def _harness_files(recipe: Recipe) -> dict[str, str]:
    """Digests of the task files of the user's own."""
    harness = recipe.evaluate.harness
    if not harness.tasks or harness.include is None:
        return {}
    files = [file for file in sorted(Path(harness.include).rglob("*")) if file.is_file()]
    return {file.relative_to(harness.include).as_posix(): file_digest(file) for file in files}
