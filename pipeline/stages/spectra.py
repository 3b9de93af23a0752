"""Stage 2: base weights -> their smallest singular triplets, one weight a Ray task, resumed weight by weight."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kasa import BottomTriplets, CheckpointWeights, Target, bottom_triplets, load_spectra, save_spectra, weight_digest
from pipeline.artifacts import Artifact
from pipeline.base_model import BaseModel
from pipeline.cluster import Resources, run_tasks
from pipeline.context import RunContext
from pipeline.keys import spectra_key

FOLDER = "spectra"


@dataclass(frozen=True)
class _Piece:
    base: Path
    target: Target
    rank: int
    out: Path


def spectra(context: RunContext, base: BaseModel, targets: Sequence[Target]) -> Artifact:
    """Make the spectra of all target weights under `spectra/`; facts: how many, the worst residual, the methods."""
    rank = context.recipe.spectra_rank

    def make(folder: Path) -> dict[str, Any]:
        pieces = [_Piece(base.folder, target, rank, folder / "pieces" / target.name) for target in targets]
        missing = [piece for piece in pieces if not piece.out.exists()]
        done = len(pieces) - len(missing)

        def show(*_: object) -> None:
            nonlocal done
            done += bool(_)
            context.check_cancelled()
            context.bars.update("spectra", done, len(pieces), "weights")

        run_tasks(_decompose, missing, Resources(), on_result=show, while_waiting=show)
        return _combine(pieces, folder)

    def publish(run_id: str, artifact: Artifact) -> None:
        context.tracking.log_parameters(run_id, {"rank": rank, "base": base.name, "base_digest": base.digest})
        context.tracking.log_metrics(run_id, {name: artifact.facts[name] for name in ("weights", "worst_residual")})
        context.log_artifact(run_id, artifact.folder / FOLDER, "spectra")

    return context.run_stage(spectra_key(context.recipe, base.digest, targets), make, publish)


def _decompose(piece: _Piece) -> None:
    torch.set_num_threads(1)
    weight = CheckpointWeights(piece.base).weight(piece.target)
    triplets = bottom_triplets(weight, piece.rank, piece.target.name)
    save_spectra(piece.out, {piece.target.name: triplets}, {piece.target.name: weight_digest(weight)})


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
