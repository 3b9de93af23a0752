"""What can be known of a run before anything is fetched, made or started. `kasa run`, `submit` and `--dry-run` ask the same.

A mistake that is found here costs seconds; found later, it costs the stages before it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

from kasa.errors import KasaError
from pipeline.cluster.connection import check_address, check_size, cluster_address
from pipeline.config.recipe import Recipe
from pipeline.core.errors import ClusterError, RecipeError, WorkspaceError
from pipeline.core.files import is_remote
from pipeline.core.machine import Finding, gpu_names, side_by_side
from pipeline.core.redaction import redacted
from pipeline.data.first_rows import FirstRows, check_first_rows, check_length
from pipeline.data.forms import AUTO
from pipeline.data.sources import resolve_source
from pipeline.evaluation.results import check_harness, check_suitable
from pipeline.methods.choice import check_registrable
from pipeline.metrics.catalogue import check_measurable
from pipeline.models.base import check_has_tokenizer, find_folder, tokenizer_facts
from pipeline.models.prompting import Prompting
from pipeline.run.graph import needed_resources
from pipeline.run.stages.prepare import check_metric
from pipeline.run.stages.train import deepspeed_settings
from pipeline.storage.workspace import check_location

# A name server may take its time; then the service counts as one that does not answer.
_SERVICES_S, _CONNECTION_S = 20.0, 8.0
# A Ray of the run's own is given as many cores as a laptop's recipe asks for, though there be but one.
_LEAST_CORES = 2


@dataclass
class Preflight:
    """What was found.

    Attributes:
        refused: why the run cannot work here, or could not even begin.
        not_checked: what could not be looked at, one line each.
    """

    refused: list[KasaError] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], object]) -> None:
        """Make a check, and note its refusal."""
        try:
            check()
        except KasaError as error:
            self.refused.append(error)

    def require(self) -> None:
        """Raise the first refusal, if there is one."""
        if self.refused:
            raise self.refused[0]


def check_before_work(recipe: Recipe, *, elsewhere: bool = False) -> Preflight:
    """Check the recipe, its inputs, this machine and the services.

    Args:
        elsewhere: the run's driver will be another machine, of which nothing is known here: packages, services, GPUs.

    Raises:
        KasaError: the recipe contradicts itself, or what it names by a local path is not there.
    """
    check_registrable(recipe)
    deepspeed_settings(recipe)
    if recipe.workspace.exists() and not recipe.workspace.is_dir():
        raise WorkspaceError(f"the workspace {recipe.workspace} is a file; name a folder with workspace=FOLDER")
    found = Preflight()
    _look_for_inputs(recipe, found, elsewhere)
    if elsewhere:
        found.not_checked.append("packages, Java, cores, GPUs and services: those of the cluster count")
        return found
    found.attempt(lambda: check_measurable(recipe.evaluate.measured))
    found.attempt(lambda: check_harness(recipe.evaluate, recipe.base.head))
    _check_services(recipe, found)
    _check_machine(recipe, found)
    return found


def _look_for_inputs(recipe: Recipe, found: Preflight, elsewhere: bool) -> None:
    here: list[list[Path]] = []
    for side in ("train", "heldout", "calibration"):
        here.append([])
        for entry in getattr(recipe.data, side):
            if elsewhere and os.path.isabs(os.path.expanduser(entry)):
                found.not_checked.append(f"data.{side} {redacted(entry)}: on storage that the cluster shares")
            elif (files := resolve_source(entry, f"data.{side}", recipe.workspace, fetch=False)) is None:
                found.not_checked.append(f"data.{side} {redacted(entry)}: it is fetched when the run begins")
            else:
                here[-1] += files
    rows = check_first_rows(recipe.data, here, recipe.base.head, whole=not found.not_checked)
    if rows.classes is not None:
        check_metric(recipe, rows.classes)
    if elsewhere and os.path.isabs(os.path.expanduser(recipe.base.model)):
        found.not_checked.append(f"base.model {recipe.base.model}: on storage that the cluster shares")
    elif (folder := find_folder(recipe.base, recipe.workspace, fetch=False)) is None:
        found.not_checked.append(f"base.model {recipe.base.model}: it is fetched when the run begins")
    else:
        check_has_tokenizer(folder, recipe.base.model)
        _check_samples(recipe, rows, folder)


def _check_samples(recipe: Recipe, rows: FirstRows, base: Path) -> None:
    """Hold what the rows show against the base's tokenizer and the evaluation."""
    if recipe.base.head != "language-model" or rows.form == AUTO:
        return
    has_template, end = tokenizer_facts(base)
    Prompting.decided(recipe.data, has_template, rows.form)
    heldout = (sample.without_end(end) for sample in rows.heldout or ())
    check_suitable(
        recipe.evaluate,
        (
            {"references": one.references, "choices": one.choices, "choice_labels": one.labels, "source": one.location}
            for one in heldout
        ),
        rows.form,
    )


def check_lengths(recipe: Recipe, context_tokens: int) -> None:
    """Refuse samples and answers longer than the base was made for.

    Args:
        context_tokens: the length of the longest sequence that it takes.

    Raises:
        KasaError: naming both lengths in tokens.
    """
    check_length(recipe.data, context_tokens)
    evaluate = recipe.evaluate
    if evaluate.generates and evaluate.max_new_tokens >= context_tokens:
        raise RecipeError(
            f"evaluate.max_new_tokens {evaluate.max_new_tokens} leaves no room for a prompt in the {context_tokens} tokens "
            "the base model takes; lower it"
        )


def _check_services(recipe: Recipe, found: Preflight) -> None:
    """Ask the services that the environment and the workspace name whether they answer."""
    address, store = cluster_address(), os.environ.get("MLFLOW_TRACKING_URI", "")
    asked: dict[str, tuple[type[KasaError], Callable[[], Finding]]] = {}
    if address:
        asked[f"RAY_ADDRESS={redacted(address)}"] = (ClusterError, partial(check_address, address, _CONNECTION_S))
    if store:
        from pipeline.tracking.server import check_store

        asked[f"MLFLOW_TRACKING_URI={redacted(store)}"] = (WorkspaceError, partial(check_store, store, _CONNECTION_S))
    if is_remote(recipe.location):
        asked[f"workspace={redacted(recipe.location)}"] = (WorkspaceError, partial(_check_storage, recipe.location))
    answers = side_by_side([check for _, check in asked.values()], _SERVICES_S)
    for (name, (kind, _)), answer in zip(asked.items(), answers, strict=True):
        if answer is None:
            found.refused.append(kind(f"{name}: no answer within {_SERVICES_S:.0f} s; correct it, or unset it"))
        elif answer.status == "fail":
            found.refused.append(kind("; ".join(filter(None, (answer.detail, answer.remedy)))))
        elif answer.status == "warn":
            found.not_checked.append(f"{answer.detail}; {answer.remedy}")


def _check_storage(location: str) -> Finding:
    try:
        check_location(location)
    except WorkspaceError as error:  # in a thread, where nobody would hear of it
        return Finding("storage", "fail", str(error))
    return Finding("storage", "ok", location)


def _check_machine(recipe: Recipe, found: Preflight) -> None:
    """Cores and GPUs of this machine; a cluster is asked when the run connects to it."""
    cpus, gpus = needed_resources(recipe)
    if address := cluster_address():
        found.not_checked.append(
            f"whether the cluster at {redacted(address)} has {cpus:g} CPU cores and {gpus} GPUs: it is asked before the first stage"
        )
        return
    names = gpu_names() if gpus else []
    there = gpus if names is None else len(names)
    if names is None:
        found.not_checked.append("GPUs: those of this machine are not NVIDIA's")
    elif gpus and version("torch").endswith("+cpu"):
        found.refused.append(
            ClusterError(
                "train.gpu: torch is installed here without CUDA; install it with CUDA, or set train.gpu=false"
            )
        )
        return
    found.attempt(lambda: check_size({"CPU": max(os.cpu_count() or 1, _LEAST_CORES), "GPU": there}, cpus, gpus))
