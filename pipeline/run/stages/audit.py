"""Stage 3: what the truncation costs the base before training begins, in loss and layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.cluster.workers import Resources, counting, run_journalled_tasks
from pipeline.config.recipe import Recipe
from pipeline.core.console import console
from pipeline.core.files import rewrite_journal
from pipeline.run.stage_runs import Work, log_artifact, run_stage
from pipeline.run.stages.spectra import FOLDER as SPECTRA
from pipeline.storage.artifacts import Artifact, StageKey

AUDIT_JSON = "audit.json"


def audit(work: Work, key: StageKey, prepared: Artifact, spectra: Artifact) -> Artifact:
    """Measure the truncated base against the base on held-out text, and warn where the difference is large.

    The artifact holds `audit.json`; facts: `base_loss`, `truncated_loss`, `tokens`, `worst` layers.
    """
    context, recipe, targets = work.context, work.recipe, work.inputs.targets

    def make(folder: Path) -> dict[str, Any]:
        from pipeline.spectra.audit import WORST_LAYERS, AuditJob, audit_truncation

        journal = folder / "progress.jsonl"
        rewrite_journal(journal, keep=lambda record: False)
        job = AuditJob(
            base_folder=work.base.folder,
            prepared=prepared.folder.resolve(),
            precision=recipe.train.precision,
            spectra=(spectra.folder / SPECTRA).resolve(),
            targets=tuple(targets),
            config=recipe.kasa_config,
            tokens=recipe.spectra.audit_tokens,
            out=(folder / AUDIT_JSON).resolve(),
            journal=journal.resolve(),
        )
        # One pass for the base, one for the truncated base, and one for each layer that is truncated alone.
        passes = 2 + min(WORST_LAYERS, len(targets))
        (facts,) = run_journalled_tasks(
            context.run_tasks,
            audit_truncation,
            [job],
            Resources(1, recipe.train.gpu),
            journals=[journal],
            follow=counting(context.bars, "audit", passes, "passes"),
        )
        journal.unlink()
        return facts

    def publish(run_id: str, artifact: Artifact) -> None:
        context.tracking.log_parameters(run_id, {"truncation": recipe.adapter.truncation, "rank": recipe.dropped_rank})
        names = ("base_loss", "truncated_loss", "tokens")
        context.tracking.log_metrics(run_id, {name: float(artifact.facts[name]) for name in names})
        log_artifact(context, run_id, artifact.folder / AUDIT_JSON)

    audited = run_stage(context, key, make, publish)
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
