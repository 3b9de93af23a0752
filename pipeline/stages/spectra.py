"""Stage 2: base weights -> the components that truncation may drop, one weight a Ray task, resumed weight by weight.

With `adapter.truncation: loss` or `activation` the calibration text is run through the base first. Where training goes on
from an adapter, what that one drops is taken over instead, and nothing is decomposed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kasa import CheckpointWeights, read_adapter
from kasa.adapter_file import SavedAdapter
from kasa.calibration import CALIBRATION_JSON, StoredCalibration
from kasa.checkpoint import weight_digest
from kasa.spectra import BottomTriplets, bottom_triplets, inherited_triplets
from kasa.spectra_file import SPECTRA_JSON, load_spectra, save_spectra
from kasa.targets import Target
from pipeline.artifacts.keys import SPECTRA, inherited_spectra_key
from pipeline.artifacts.store import Artifact
from pipeline.base.model import BaseModel
from pipeline.cluster import Resources
from pipeline.context import RunContext
from pipeline.journal import JournalTail
from pipeline.planning.spectra_memory import Weighted, decomposition_bytes
from pipeline.prepare.stage import load_prepared
from pipeline.recipe import Recipe
from pipeline.retraining.warm_start import Start, chosen_spectra_key, start_adapter
from pipeline.truncation import CalibrationShard, calibrate_shard, first_rows

FOLDER = "spectra"


@dataclass(frozen=True)
class _Piece:
    """One weight.

    Attributes:
        calibration: the folders with what text did in its layer; empty without them.
        inherited: the factors to take over, where there are some; then nothing is decomposed.
    """

    base: Path
    target: Target
    rank: int
    calibration: tuple[Path, ...]
    out: Path
    inherited: tuple[torch.Tensor, torch.Tensor] | None = None


def spectra(
    context: RunContext, base: BaseModel, targets: Sequence[Target], prepared: Artifact | None, start: Start | None
) -> Artifact:
    """Make the spectra of all target weights under `spectra/`; facts: how many, the worst residual, the methods.

    Args:
        prepared: the text that the truncation rule looks at; None where it looks at the weights alone, or with `start`.
        start: the adapter to go on from. Its spectra are the ones it was trained beside: the same artifact, or, where that
            is gone, what the adapter itself holds of them.
    """
    recipe = context.recipe

    def make(folder: Path) -> dict[str, Any]:
        calibration = _calibrate(context, base, targets, prepared, folder) if prepared else ()
        inherited = inherited_factors(read_adapter(start_adapter(context, start))) if start else {}
        pieces = [
            _Piece(
                base.folder,
                target,
                recipe.spectra_rank,
                calibration,
                folder / "pieces" / target.name,
                inherited.get(target.name),
            )
            for target in targets
        ]
        missing = [piece for piece in pieces if not (piece.out / SPECTRA_JSON).exists()]
        done = len(pieces) - len(missing)

        def show(*result: object) -> None:
            nonlocal done
            done += bool(result)
            context.bars.update("spectra", done, len(pieces), "weights")

        context.run_tasks(_decompose, missing, partial(_resources, recipe), on_result=show, while_waiting=show)
        facts = _combine(pieces, folder)
        shutil.rmtree(folder / "calibration", ignore_errors=True)
        return facts

    def publish(run_id: str, artifact: Artifact) -> None:
        settings = {"rank": recipe.spectra_rank, "base": base.name, "base_digest": base.digest}
        context.tracking.log_parameters(run_id, {**settings, "spectra": recipe.spectra.model_dump(mode="json")})
        context.tracking.log_metrics(run_id, {name: artifact.facts[name] for name in ("weights", "worst_residual")})
        context.log_artifact(run_id, artifact.folder / FOLDER, "spectra")

    if start and SPECTRA in context.remade:
        # What can be made anew is what the adapter holds, not what its own spectra were made from.
        key = inherited_spectra_key(recipe, base.digest, targets, start.train_key)
    else:
        text = prepared.key if prepared else None
        key = chosen_spectra_key(recipe, context.store, base.digest, targets, text, start)
    return context.run_stage(key, make, publish)


def _calibrate(
    context: RunContext, base: BaseModel, targets: Sequence[Target], prepared: Artifact, folder: Path
) -> tuple[Path, ...]:
    """Run the calibration text through the base, shared out over the training workers; the folders of their sums."""
    recipe = context.recipe
    count = recipe.train.workers
    parts = [folder / "calibration" / f"part-{index}-of-{count}" for index in range(count)]
    shards = [
        CalibrationShard(
            base_folder=base.folder,
            prepared=prepared.folder.resolve(),
            precision=recipe.train.precision,
            targets=tuple(targets),
            tokens=recipe.spectra.calibration_tokens,
            gradients=recipe.adapter.truncation == "loss",
            index=index,
            count=count,
            out=part.resolve(),
            journal=part.with_suffix(".jsonl").resolve(),
        )
        for index, part in enumerate(parts)
        if not (part / CALIBRATION_JSON).exists()
    ]
    samples = load_prepared(prepared.folder).calibration
    tokens = sum(
        len(ids) for ids in samples[: len(first_rows(samples, recipe.spectra.calibration_tokens))]["input_ids"]
    )
    tails = [JournalTail(part.with_suffix(".jsonl")) for part in parts]
    seen = 0

    def show() -> None:
        nonlocal seen
        seen += sum(record["tokens"] for tail in tails for record in tail.new_records())
        context.bars.update("calibrate", min(seen, tokens), tokens, "tokens")

    context.run_tasks(calibrate_shard, shards, Resources(1, recipe.train.gpu), while_waiting=show)
    show()
    return tuple(part.resolve() for part in parts)


def inherited_factors(adapter: SavedAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """U_d S_d and V_d^T of every layer by its name; without columns and rows where it drops nothing."""
    found = {}
    for target in adapter.targets:
        left_OD = adapter.dropped.get(f"{target.name}.dropped_left", torch.zeros(target.out_features, 0))
        right_DI = adapter.dropped.get(f"{target.name}.dropped_right", torch.zeros(0, target.in_features))
        found[target.name] = left_OD, right_DI
    return found


def _decompose(piece: _Piece) -> None:
    torch.set_num_threads(1)
    weight = CheckpointWeights(piece.base).weight(piece.target)
    if piece.inherited is not None:
        triplets = inherited_triplets(weight, *piece.inherited)
        save_spectra(piece.out, {piece.target.name: triplets}, {piece.target.name: weight_digest(weight)})
        return
    weighting = StoredCalibration(piece.calibration).weighting(piece.target.name) if piece.calibration else None
    triplets = bottom_triplets(weight, piece.rank, piece.target.name, weighting)
    save_spectra(piece.out, {piece.target.name: triplets}, {piece.target.name: weight_digest(weight)})


def _resources(recipe: Recipe, piece: _Piece) -> Resources:
    # A large model's weights must not all meet on one node; none is stored in more than fp32.
    weighted: dict[str, Weighted] = {"activation": "inputs", "loss": "both"}
    return Resources(memory_bytes=decomposition_bytes(piece.target, 4, weighted.get(recipe.adapter.truncation, "no")))


def _combine(pieces: Sequence[_Piece], folder: Path) -> dict[str, Any]:
    triplets: dict[str, BottomTriplets] = {}
    digests: dict[str, str] = {}
    for piece in pieces:
        one, digest = load_spectra(piece.out)
        triplets |= one
        digests |= digest
    save_spectra(folder / FOLDER, triplets, digests)
    shutil.rmtree(folder / "pieces")
    methods = [spectrum.method for spectrum in triplets.values()]
    return {
        "weights": len(triplets),
        "worst_residual": max(spectrum.residual for spectrum in triplets.values()),
        "methods": {method: methods.count(method) for method in sorted(set(methods))},
    }
