"""Stage 6: a new version in the model registry, and its aliases: `@champion` only if it passes the gate.

Each part is done once, however often the stage is interrupted: a version is known by the stage's key, and its history tells
whether its aliases have been set. After that the aliases belong to people (`kasa promote`, `kasa rollback`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import ModelError
from pipeline.models.base import BaseModel
from pipeline.registry.aliases import (
    after_keeping_out,
    after_promotion,
    change_aliases,
    event,
    finish_interrupted_change,
    history,
)
from pipeline.registry.store import CHAMPION, KEY_TAG, PREVIOUS, ModelVersion, Registry
from pipeline.run.context import one_change_at_a_time
from pipeline.run.dependencies import REGISTER
from pipeline.run.model_package import (
    KEPT_OUT,
    PARENT_TAG,
    PROMOTED,
    gate_of,
    package_of,
    version_tags,
    write_report,
)
from pipeline.run.promotion import Decision, decide, model_card, too_few
from pipeline.run.stage_runs import Work, run_stage
from pipeline.run.stages.evaluate import Evaluation
from pipeline.run.warm_start import adapter_tags, start_tags
from pipeline.storage.artifacts import Artifact, StageKey

GATE = "gate"


@dataclass(frozen=True)
class Registration:
    """The version, the verdict on it, and the aliases it carries now."""

    artifact: Artifact
    model: ModelVersion
    decision: Decision
    aliases: tuple[str, ...]

    @property
    def is_champion(self) -> bool:
        """Whether it is the champion now: promoted, and not replaced or rolled back since."""
        return CHAMPION in self.aliases

    @property
    def uri(self) -> str:
        """How to load it: by alias where it is the champion, else by number."""
        return f"models:/{self.model.name}@{CHAMPION}" if self.is_champion else self.model.uri


def register(work: Work, key: StageKey, adapter: Artifact, evaluation: Evaluation) -> Registration:
    """Register the adapter and decide on its promotion; both happen once for one adapter, evaluation and bar.

    Raises:
        ModelError: while this run was at work, another one promoted a version that it was not compared with.
    """
    context, recipe = work.context, work.recipe
    tracking, registry = context.tracking, context.registry

    def make(folder: Path) -> dict[str, Any]:
        context.confirm()
        with one_change_at_a_time(context.storage, recipe.registered_name):
            return register_and_decide(folder)

    def register_and_decide(folder: Path) -> dict[str, Any]:
        finish_interrupted_change(registry, recipe.registered_name)
        made_before = {KEY_TAG: key.key}
        if REGISTER in context.recomputed:  # a new version is asked for; one of this very run, interrupted, is that
            made_before[PARENT_TAG] = context.parent_run
        version = registry.find(recipe.registered_name, made_before)
        if version and not history(version):  # a process registered it that died before the aliases
            registry.check_files(version)
        version = version or _new_version(work, key, evaluation, folder)
        if not history(version):
            context.confirm()
            registry.describe(version, _card(version, work.base, evaluation))
            _set_aliases(registry, version)
        tags = version.tags
        return {
            "name": version.name,
            "version": version.version,
            "promote": tags["kasa.decision"] == PROMOTED,
            "reason": tags["kasa.reason"],
        }

    def publish(run_id: str, artifact: Artifact) -> None:
        facts = artifact.facts
        metric = recipe.evaluate.gate_metric
        tracking.log_parameters(run_id, {"model": facts["name"], "version": facts["version"], "metric": metric})
        tracking.log_parameters(run_id, {"promotion": recipe.promotion.model_dump(mode="json")})
        tracking.tag(run_id, {"kasa.decision": json.dumps({"promote": facts["promote"], "reason": facts["reason"]})})

    known = context.store.find(key)
    if known:
        version = registry.version(known.facts["name"], known.facts["version"])
        # A registry that was deleted and filled again has other versions under the same numbers.
        if version is None or version.tags.get(KEY_TAG) != key.key:
            context.store.remove(known)
    artifact = run_stage(context, key, make, publish)
    facts = artifact.facts
    model = registry.version(facts["name"], facts["version"])
    assert model is not None
    aliases = registry.aliases(recipe.registered_name)
    carried = tuple(alias for alias, version in aliases.items() if version == model.version)
    return Registration(artifact, model, Decision(facts["promote"], facts["reason"]), carried)


def _new_version(work: Work, key: StageKey, evaluation: Evaluation, folder: Path) -> ModelVersion:
    """A version of the adapter with the verdict on it, without aliases yet."""
    context, recipe, base = work.context, work.recipe, work.base
    name = recipe.registered_name
    for artifact in work.made.values():  # hours may have passed since they were found or made
        context.store.check(artifact.folder)
    obstacle = evaluation.obstacle or too_few(len(evaluation.samples["adapted"]))
    decision = decide(gate_of(recipe), evaluation.differences, obstacle)
    _check_champion(context.registry, name, evaluation, decision)
    lora = write_report(folder, recipe, work.made, base, evaluation, decision)
    tags = {
        KEY_TAG: key.key,
        **version_tags(context, base, work.sources, work.made, evaluation, decision),
        **adapter_tags(recipe, work.inputs.targets),
        **start_tags(work.start),
        "kasa.lora": lora,
    }
    package = package_of(folder, recipe, base, work.made, with_lora=lora.startswith("rank"))
    context.confirm()
    return context.registry.register(context.children[key.stage], name, package, tags)


def _check_champion(registry: Registry, name: str, evaluation: Evaluation, decision: Decision) -> None:
    """What was judged against one champion must not replace another."""
    now, then = registry.aliases(name).get(CHAMPION), evaluation.champion_version
    if decision.promote and now != then:
        before, after = (f"version {version}" if version else "none" for version in (then, now))
        raise ModelError(
            f"while this run was at work, the champion of {name} changed from {before} to {after}; run the same command "
            "again to be compared with that one"
        )


def _set_aliases(registry: Registry, version: ModelVersion) -> None:
    aliases = registry.aliases(version.name)
    reason = version.tags["kasa.reason"]
    if version.tags["kasa.decision"] != PROMOTED:
        moves, what = after_keeping_out(aliases, version.version), KEPT_OUT
    elif aliases.get(CHAMPION, "") != version.tags["kasa.judged_against"]:
        # This run was interrupted between version and aliases, and is ended now that things are different.
        reason = f"{reason}; but the champion it was judged against is none any more"
        registry.tag_version(version, {"kasa.decision": KEPT_OUT, "kasa.reason": reason})
        version.tags.update({"kasa.decision": KEPT_OUT, "kasa.reason": reason})
        moves, what = after_keeping_out(aliases, version.version), KEPT_OUT
    else:
        moves, what = after_promotion(aliases, version.version), PROMOTED
    events = [event(version.version, what, GATE, reason)]
    if what == PROMOTED and (replaced := moves.get(PREVIOUS)):
        events.append(event(replaced, "replaced", GATE, f"version {version.version} was promoted"))
    change_aliases(registry, version.name, moves, events)


def _card(version: ModelVersion, base: BaseModel, evaluation: Evaluation) -> str:
    tags = version.tags
    captions = {"data": "kasa.data_digest", "base's files": "kasa.base_digest", "code": "kasa.code.commit"}
    lineage = {"base": base.name} | {caption: tags[tag] for caption, tag in captions.items() if tag in tags}
    verdict = Decision(tags["kasa.decision"] == PROMOTED, tags["kasa.reason"])
    return model_card(verdict, evaluation.metrics, evaluation.differences, lineage, len(evaluation.samples["adapted"]))
