"""Stage 3: what the truncation costs the base before training begins, in loss and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kasa.targets import Target
from pipeline.artifacts.store import Artifact
from pipeline.cluster.workers import Resources
from pipeline.config.recipe import Recipe
from pipeline.core.console import console
from pipeline.core.journal import JournalTail, rewrite_journal
from pipeline.methods.choice import kasa_config
from pipeline.models.base import BaseModel
from pipeline.run.context import RunContext
from pipeline.run.graph import audit_key
from pipeline.run.stages.spectra import FOLDER as SPECTRA

AUDIT_JSON = "audit.json"


def audit(
    context: RunContext, base: BaseModel, targets: Sequence[Target], prepared: Artifact, spectra: Artifact
) -> Artifact:
    """Measure the truncated base against the base on held-out text, and warn where the difference is large.

    The artifact holds `audit.json`; facts: `base_loss`, `truncated_loss`, `tokens`, `worst` layers.
    """
    recipe = context.recipe

    def make(folder: Path) -> dict[str, Any]:
        from pipeline.spectra.calibration_jobs import WORST_LAYERS, AuditJob, audit_truncation  # torch

        journal = folder / "progress.jsonl"
        rewrite_journal(journal, keep=lambda record: False)
        job = AuditJob(
            base_folder=base.folder,
            prepared=prepared.folder.resolve(),
            precision=recipe.train.precision,
            spectra=(spectra.folder / SPECTRA).resolve(),
            targets=tuple(targets),
            config=kasa_config(recipe),
            tokens=recipe.spectra.audit_tokens,
            out=(folder / AUDIT_JSON).resolve(),
            journal=journal.resolve(),
        )
        tail, passes = JournalTail(journal), 2 + min(WORST_LAYERS, len(targets))
        done = 0

        def show() -> None:
            nonlocal done
            done += len(tail.new_records())
            context.bars.update("audit", min(done, passes), passes, "passes")

        (facts,) = context.run_tasks(audit_truncation, [job], Resources(1, recipe.train.gpu), while_waiting=show)
        show()
        journal.unlink()
        return facts

    def publish(run_id: str, artifact: Artifact) -> None:
        context.tracking.log_parameters(run_id, {"truncation": recipe.adapter.truncation, "rank": recipe.dropped_rank})
        names = ("base_loss", "truncated_loss", "tokens")
        context.tracking.log_metrics(run_id, {name: float(artifact.facts[name]) for name in names})
        context.log_artifact(run_id, artifact.folder / AUDIT_JSON)

    audited = context.run_stage(audit_key(recipe, prepared.key, spectra.key), make, publish)
    if warning := truncation_warning(recipe, audited.facts):
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    return audited


def truncation_warning(recipe: Recipe, facts: dict[str, Any]) -> str | None:
    """What to say of a truncation that costs more than `spectra.warn_above`."""
    base, truncated = facts["base_loss"], facts["truncated_loss"]
    if truncated - base <= recipe.spectra.warn_above:
        return None
    worst = facts["worst"][0]
    remedy = (
        "lower adapter.truncation_rank, raise spectra.calibration_tokens, or name other adapter.targets"
        if recipe.calibrated
        else "use adapter.truncation=loss, or leave those layers out of adapter.targets"
    )
    if recipe.base.head != "language-model":
        return (
            f"truncation changes {truncated:.0%} of what the new head reads of held-out text, before training begins (worst: "
            f"{worst['name']}, alone {worst['loss']:.0%}); {remedy}"
        )
    return (
        f"truncation takes the base's loss on held-out text from {base:.3f} to {truncated:.3f} before training begins "
        f"(worst: {worst['name']}, alone {worst['loss']:.3f}); {remedy}"
    )
