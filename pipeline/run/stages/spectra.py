"""Stage 2: base weights -> the components that truncation may drop, one weight a Ray task, resumed weight by weight.

With `adapter.truncation: loss` or `activation` the calibration text is run through the base first. Where training goes on
from an adapter, what that one drops is taken over instead, and nothing is decomposed. In a comparison CorDA's components,
which it starts from, come about in the same way.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa.targets import Target
from pipeline.artifacts.store import Artifact
from pipeline.cluster.workers import Resources
from pipeline.config.recipe import Recipe
from pipeline.core.journal import JournalTail
from pipeline.data.prepared import load_prepared
from pipeline.models.base import BaseModel
from pipeline.run.context import RunContext
from pipeline.run.graph import SPECTRA, inherited_spectra_key
from pipeline.run.warm_start import WarmStart, chosen_spectra_key, start_adapter
from pipeline.spectra.memory import decomposition_bytes

if TYPE_CHECKING:
    from pipeline.spectra.decomposition import SpectrumTask

FOLDER = "spectra"


def spectra(
    context: RunContext, base: BaseModel, targets: Sequence[Target], prepared: Artifact | None, start: WarmStart | None
) -> Artifact:
    """Make the spectra of all target weights under `spectra/`; facts: how many, the worst residual, the methods.

    Args:
        prepared: the text that the truncation rule looks at; None where it looks at the weights alone, or with `start`.
        start: the adapter to go on from. Its spectra are the ones it was trained beside: the same artifact, or, where that
            is gone, what the adapter itself holds of them.
    """
    recipe = context.recipe

    def make(folder: Path) -> dict[str, Any]:
        from kasa import read_adapter  # torch
        from kasa.spectra_file import SPECTRA_JSON
        from pipeline.spectra.decomposition import SpectrumTask, combine, decompose, inherited_factors

        calibration = _calibrate(context, base, targets, prepared, folder) if prepared else ()
        inherited = inherited_factors(read_adapter(start_adapter(context, start))) if start else {}
        pieces = [
            SpectrumTask(
                base.folder,
                target,
                recipe.spectra_rank,
                calibration,
                folder / "pieces" / target.name,
                inherited.get(target.name),
                recipe.adapter.method == "corda",
            )
            for target in targets
        ]
        missing = [piece for piece in pieces if not (piece.out / SPECTRA_JSON).exists()]
        done = len(pieces) - len(missing)

        def show(*result: object) -> None:
            nonlocal done
            done += bool(result)
            context.bars.update("spectra", done, len(pieces), "weights")

        context.run_tasks(decompose, missing, partial(_resources, recipe), on_result=show, while_waiting=show)
        facts = combine(pieces, folder / FOLDER)
        for finished_with in ("pieces", "calibration"):
            shutil.rmtree(folder / finished_with, ignore_errors=True)
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
    from kasa.calibration import CALIBRATION_JSON  # torch
    from pipeline.spectra.calibration_jobs import CalibrationShard, calibrate_shard, first_rows

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
            gradients=recipe.weighted == "both",
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


def _resources(recipe: Recipe, piece: SpectrumTask) -> Resources:
    # A large model's weights must not all meet on one node; none is stored in more than fp32.
    return Resources(memory_bytes=decomposition_bytes(piece.target, 4, recipe.weighted))
