"""Stage 2: base weights -> the components that truncation may drop, one weight a Ray task, resumed weight by weight.

With `adapter.truncation: loss` or `activation` the calibration text is run through the base first. Where training starts
from an adapter, what that one drops is taken over, and nothing is decomposed. In a comparison CorDA's components, which it
starts from, are computed in the same way. Each task reserves the memory that its decomposition needs, by the weight's shape.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa.targets import Target
from pipeline.cluster.workers import Resources, counting, run_journalled_tasks
from pipeline.config.recipe import Recipe, Weighted
from pipeline.core.files import Record
from pipeline.data.prepared import load_prepared
from pipeline.run.stage_runs import Work, log_artifact, run_stage
from pipeline.run.warm_start import start_adapter
from pipeline.storage.artifacts import Artifact, StageKey

if TYPE_CHECKING:
    from pipeline.spectra.decomposition import SpectrumTask

# A worker process with torch and this package loaded.
_PROCESS_BYTES = 2**29
# Bytes per element of a covariance: kept in fp32 and its root in fp64; several fp64 copies exist while the root is computed.
_KEPT_BYTES, _ROOTED_BYTES = 4 + 8, 30
# Bytes per element of K x K: the Gram matrix in fp64, its factor, and the Krylov space, which may span a third of it.
_GRAM_BYTES = 8 + 8 + 4

FOLDER = "spectra"


def decomposition_bytes(target: Target, element_bytes: int, weighted: Weighted) -> int:
    """Peak memory of a decomposition in bytes, its process included.

    A full SVD, the rare last resort, needs more.

    Args:
        target: the weight.
        element_bytes: of the stored weight.
        weighted: which covariances take part: none, that of the inputs, or that of the output gradients as well. Layers
            with O > I do without the latter (see `kasa.calibration`).
    """
    size = target.out_features * target.in_features
    smaller = min(target.out_features, target.in_features) ** 2
    inputs = 0 if weighted == "no" else target.in_features**2
    gradients = target.out_features**2 if weighted == "both" and target.out_features <= target.in_features else 0
    # Bytes per element of O x I: the weight in fp64, and the product with the covariances' roots.
    copies = 8 if weighted == "no" else 16
    stages = (
        _ROOTED_BYTES * inputs,
        _KEPT_BYTES * inputs + _ROOTED_BYTES * gradients,
        _KEPT_BYTES * (inputs + gradients) + copies * size + _GRAM_BYTES * smaller,
    )
    return _PROCESS_BYTES + element_bytes * size + max(stages)


def spectra(work: Work, key: StageKey, prepared: Artifact | None = None) -> Artifact:
    """Make the spectra of all target weights under `spectra/`; facts: how many, the worst residual, the methods.

    Args:
        prepared: the text that the truncation rule looks at; None where it looks at the weights alone, or where
            `work.start` has an adapter that brings its spectra along.
    """
    context, recipe, base = work.context, work.recipe, work.base

    def make(folder: Path) -> dict[str, Any]:
        from pipeline.spectra.decomposition import combine  # torch

        calibration = _calibrate(work, prepared, folder) if prepared else ()
        pieces = _pieces(work, folder, calibration)
        _decompose(work, pieces)
        facts = combine(pieces, folder / FOLDER)
        for finished_with in ("pieces", "calibration"):
            shutil.rmtree(folder / finished_with, ignore_errors=True)
        return facts

    def publish(run_id: str, artifact: Artifact) -> None:
        settings = {"rank": recipe.spectra_rank, "base": base.name, "base_digest": base.digest}
        context.tracking.log_parameters(run_id, {**settings, "spectra": recipe.spectra.model_dump(mode="json")})
        context.tracking.log_metrics(run_id, {name: artifact.facts[name] for name in ("weights", "worst_residual")})
        log_artifact(context, run_id, artifact.folder / FOLDER, "spectra")

    return run_stage(context, key, make, publish)


def _pieces(work: Work, folder: Path, calibration: tuple[Path, ...]) -> list[SpectrumTask]:
    from kasa import read_adapter  # torch
    from pipeline.spectra.decomposition import SpectrumTask, inherited_factors

    start, recipe = work.start, work.recipe
    inherited = inherited_factors(read_adapter(start_adapter(work.context, start))) if start else {}
    return [
        SpectrumTask(
            work.base.folder,
            target,
            recipe.spectra_rank,
            calibration,
            folder / "pieces" / target.name,
            inherited.get(target.name),
            recipe.adapter.spec.components == "leading",
        )
        for target in work.inputs.targets
    ]


def _decompose(work: Work, pieces: Sequence[SpectrumTask]) -> None:
    """Make the spectra that an earlier run of this command has not finished."""
    from kasa.folders import is_sound  # torch
    from kasa.spectra_file import SPECTRA_JSON
    from pipeline.spectra.decomposition import decompose

    missing = [piece for piece in pieces if not is_sound(piece.out, SPECTRA_JSON)]
    count = counting(work.context.bars, "spectra", len(pieces), "weights")
    count([{}] * (len(pieces) - len(missing)))
    work.context.run_tasks(
        decompose,
        missing,
        partial(_resources, work.recipe),
        on_result=lambda piece, result: count([{}]),
        while_waiting=lambda: count([]),
    )


def _calibrate(work: Work, prepared: Artifact, folder: Path) -> tuple[Path, ...]:
    """Run the calibration text through the base, shared out over the training workers; the folders of their sums."""
    from kasa.calibration import CALIBRATION_JSON  # torch
    from kasa.folders import is_sound
    from pipeline.spectra.calibration import CalibrationShard, calibrate_shard, first_rows

    context, recipe = work.context, work.recipe
    count = recipe.train.workers
    parts = [folder / "calibration" / f"part-{index}-of-{count}" for index in range(count)]
    shards = [
        CalibrationShard(
            base_folder=work.base.folder,
            prepared=prepared.folder.resolve(),
            precision=recipe.train.precision,
            targets=tuple(work.inputs.targets),
            tokens=recipe.spectra.calibration_tokens,
            gradients=recipe.weighted == "both",
            index=index,
            count=count,
            out=part.resolve(),
            journal=part.with_suffix(".jsonl").resolve(),
        )
        for index, part in enumerate(parts)
        if not is_sound(part, CALIBRATION_JSON)
    ]
    samples = load_prepared(prepared.folder).calibration
    rows = samples[: len(first_rows(samples, recipe.spectra.calibration_tokens))]["input_ids"]
    run_journalled_tasks(
        context.run_tasks,
        calibrate_shard,
        shards,
        Resources(1, recipe.train.gpu),
        journals=[part.with_suffix(".jsonl") for part in parts],
        follow=counting(context.bars, "calibrate", sum(map(len, rows)), "tokens", _tokens),
    )
    return tuple(part.resolve() for part in parts)


def _tokens(records: Sequence[Record]) -> int:
    return sum(record["tokens"] for record in records)


def _resources(recipe: Recipe, piece: SpectrumTask) -> Resources:
    # A large model's weights must not all meet on one node; none is stored in more than fp32.
    return Resources(memory_bytes=decomposition_bytes(piece.target, 4, recipe.weighted))
