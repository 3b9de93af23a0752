"""From the stages' artifacts to the facts on the page."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from kasa.files import read_json
from pipeline.config.recipe import recipe_values
from pipeline.core.code import package_versions
from pipeline.core.files import read_journal, workspace_option
from pipeline.core.machine import gpu_names
from pipeline.core.redaction import redacted, shell_command
from pipeline.data.prepared import load_prepared
from pipeline.report.facts import LayerFacts, ReportFacts, SampleFacts, TruncationFacts
from pipeline.report.render import render_report
from pipeline.run.context import RunContext
from pipeline.run.stages.audit import AUDIT_JSON, truncation_warning
from pipeline.run.stages.evaluate import Evaluation
from pipeline.run.stages.register import Registration
from pipeline.storage.artifacts import Artifact
from pipeline.tracking.server import ui_command
from pipeline.training.job import JOURNAL, LAYERS

_PACKAGES = ("kasa-pipeline", "torch", "deepspeed", "ray", "mlflow", "transformers", "datasets", "numpy", "scipy")


def write_report(
    context: RunContext, artifacts: Mapping[str, Artifact], evaluation: Evaluation, registration: Registration
) -> Path:
    """Render the run's page to `WORKSPACE/reports/RUN.html` and log it to the parent run, with the metrics."""
    path = context.workspace / "reports" / f"{context.recipe.name}-{context.parent_run[:8]}.html"
    path.parent.mkdir(exist_ok=True)
    render_report(_facts(context, artifacts, evaluation, registration), path)
    context.storage.save(path)
    tracking, run_id = context.tracking, context.parent_run
    tracking.log_files(run_id, path)
    for candidate, metrics in evaluation.metrics.items():
        tracking.log_metrics(run_id, {f"{candidate}.{metric}": value for metric, value in metrics.items()})
    tracking.tag(run_id, {"kasa.model": registration.uri, "kasa.reason": registration.decision.reason})
    return path


def environment_tags() -> dict[str, str]:
    """Versions and hardware, as tags of the parent run."""
    return {
        **{f"kasa.version.{name}": version for name, version in package_versions(_PACKAGES).items()},
        **{f"kasa.machine.{name}": value for name, value in _machine().items()},
    }


def use_commands(context: RunContext, registration: Registration) -> dict[str, str]:
    """What to type next, by caption."""
    where = workspace_option(context.recipe.location)
    example = load_prepared_prompt(context)
    return {
        "Ask the model": shell_command(_program("kasa"), "generate", registration.uri, *where, example),
        "See the runs": ui_command(context.workspace, _program("mlflow")),
    }


def _program(name: str) -> str:
    """How this shell finds a program of our environment: by its name, or by the path of an environment not activated."""
    if shutil.which(name):
        return name
    beside_python = Path(sys.executable).with_name(name)
    return os.path.relpath(beside_python) if beside_python.is_relative_to(Path.cwd()) else str(beside_python)


def load_prepared_prompt(context: RunContext) -> str:
    """A short example prompt of the kind the model was trained on, in one line."""
    prepared = next(facts for facts in context.finished if facts.name == "prepare")
    heldout = load_prepared(context.workspace / "artifacts" / "prepare" / prepared.key).heldout
    fitting = [prompt for prompt in heldout["prompt"][:200] if prompt.isprintable() and not prompt.startswith("-")]
    return min(fitting, key=lambda prompt: abs(len(prompt) - 60), default="Hello")


def _facts(
    context: RunContext, artifacts: Mapping[str, Artifact], evaluation: Evaluation, registration: Registration
) -> ReportFacts:
    prepared = load_prepared(artifacts["prepare"].folder)
    records = read_journal(artifacts["train"].folder / JOURNAL)
    return ReportFacts(
        title=context.recipe.name,
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdict=registration.decision.reason,
        promoted=registration.decision.promote,
        model_uri=registration.uri,
        gate_metric=context.recipe.evaluate.gate_metric,
        metrics=evaluation.metrics,
        intervals=evaluation.intervals,
        differences=evaluation.differences["base"],
        harness=evaluation.harness,
        heldout_rows=len(prepared.heldout),
        truncation=_truncation(context, artifacts["audit"]) if "audit" in artifacts else None,
        training=records,
        layers=_layers(artifacts),
        samples=_samples(prepared.heldout, evaluation),
        stages=context.finished,
        dataset={
            "sources": redacted(", ".join(context.recipe.data.train + context.recipe.data.heldout)),
            **prepared.summary,
        },
        rejected_rows=prepared.summary["rejected_first"],
        interruptions=artifacts["train"].facts["interruptions"],
        recipe_yaml=yaml.safe_dump(recipe_values(context.recipe), sort_keys=False),
        versions=package_versions(_PACKAGES),
        machine=_machine(),
        commands=use_commands(context, registration),
    )


def _truncation(context: RunContext, audited: Artifact) -> TruncationFacts:
    facts = audited.facts
    return TruncationFacts(
        rule=context.recipe.adapter.truncation,
        rank=context.recipe.dropped_rank,
        tokens=facts["tokens"],
        base_loss=facts["base_loss"],
        truncated_loss=facts["truncated_loss"],
        worst=[(layer["name"], layer["loss"]) for layer in facts["worst"]],
        warning=truncation_warning(context.recipe, facts),
        below_head=context.recipe.base.head != "language-model",
    )


def _layers(artifacts: Mapping[str, Artifact]) -> list[LayerFacts]:
    layers = read_json(artifacts["train"].folder / LAYERS, list)
    shares = read_json(artifacts["audit"].folder / AUDIT_JSON)["shares"] if "audit" in artifacts else {}
    return [LayerFacts(**layer, output_share=shares.get(layer["name"], 0.0)) for layer in layers]


def _samples(heldout: Any, evaluation: Evaluation) -> list[SampleFacts]:
    by_name = {name: {r["sample"]: r for r in records} for name, records in evaluation.samples.items()}
    shown = [r["sample"] for r in evaluation.samples["adapted"] if "output" in r][:8]
    return [
        SampleFacts(
            prompt=heldout[index]["prompt"],
            references=heldout[index]["references"],
            outputs={name: records[index]["output"] for name, records in by_name.items()},
        )
        for index in shown
    ]


def _machine() -> dict[str, str]:
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "gpus": ", ".join(gpu_names() or []) or "none",
        "system": platform.platform(terse=True),
        "python": sys.version.split()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
