"""`kasa models`, `kasa promote` and `kasa rollback`: the versions in the registry, and changes of their aliases by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.code import user_name
from pipeline.core.errors import ModelError
from pipeline.core.files import workspace_option
from pipeline.core.redaction import shell_command
from pipeline.metrics.intervals import Interval
from pipeline.registry.aliases import (
    after_promotion,
    after_rollback,
    change_aliases,
    event,
    finish_interrupted_change,
    history,
)
from pipeline.registry.store import CHAMPION, PREVIOUS, ModelVersion, Registry, open_registry
from pipeline.run.context import one_change_at_a_time
from pipeline.storage.workspace import Workspace

_NO_REASON = "no reason given"


@dataclass(frozen=True)
class ModelRow:
    """A registered version, as the table shows it.

    Attributes:
        version: the version with its tags.
        aliases: the aliases that it has now.
        decision: the gate's decision.
        reason: the gate's reason.
        metric: the metric that the gate decided on.
        value: the version's value of that metric.
        opponent: what it was compared with: the champion of that time, or else the base.
        difference: version - opponent of the metric.
        history: promotions and rollbacks of the version, oldest first.
    """

    version: ModelVersion
    aliases: tuple[str, ...]
    decision: str
    reason: str
    metric: str
    value: float | None
    opponent: str
    difference: Interval | None
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """The result of a command that changes aliases.

    Attributes:
        name: the registered model.
        champion: the champion's version now.
        previous: the previous champion's version now.
        before: the champion's version before the command.
        reason: the reason that was given.
        changed: False if the aliases were as wanted already.
        undo: the command that goes back; empty where there is nothing to go back to.
    """

    name: str
    champion: str
    previous: str | None
    before: str | None
    reason: str
    changed: bool
    undo: str = ""


def list_models(workspace: Path, name: str | None) -> list[ModelRow]:
    """All versions of one model or of all, newest first.

    Raises:
        ModelError: there is no such model.
    """
    registry = open_registry(workspace)
    if name is not None:
        registry.check_name(name)
    rows = []
    for model in [name] if name is not None else registry.names():
        aliases = registry.aliases(model)
        rows += [_row(version, aliases) for version in registry.versions(model)]
    return rows


def promote(workspace: Path, uri: str, reason: str | None) -> Change:
    """Make a version the champion, whatever the gate decided.

    Raises:
        ModelError: there is no such version, or it is damaged.
    """
    registry = open_registry(workspace)
    version = registry.look_up(uri)
    registry.check_files(version)
    with one_change_at_a_time(Workspace(workspace), version.name):
        return _promote(registry, workspace, version, reason)


def _promote(registry: Registry, workspace: Path, version: ModelVersion, reason: str | None) -> Change:
    finish_interrupted_change(registry, version.name)
    aliases = registry.aliases(version.name)
    moves = after_promotion(aliases, version.version)
    if not moves:
        return Change(version.name, version.version, aliases.get(PREVIOUS), version.version, "", changed=False)
    words = _words(reason)
    events = [event(version.version, "promoted by hand", user_name(), words)]
    if replaced := moves.get(PREVIOUS):
        events.append(
            event(replaced, "replaced", user_name(), f"version {version.version} was promoted by hand: {words}")
        )
    change_aliases(registry, version.name, moves, events)
    return _change(registry, workspace, version.name, aliases.get(CHAMPION), words)


def rollback(workspace: Path, name: str, reason: str | None) -> Change:
    """Make the previous champion the champion again, and the champion the previous one.

    Raises:
        ModelError: there is no such model, no previous champion, or that one is damaged.
    """
    registry = open_registry(workspace)
    registry.check_name(name)
    with one_change_at_a_time(Workspace(workspace), name):
        return _rollback(registry, workspace, name, reason)


def _rollback(registry: Registry, workspace: Path, name: str, reason: str | None) -> Change:
    finish_interrupted_change(registry, name)
    aliases = registry.aliases(name)
    moves = after_rollback(aliases, name)
    words, back = _words(reason), str(moves[CHAMPION])
    version = registry.version(name, back)
    if version is None:
        raise ModelError(
            f"the previous champion of {name}, version {back}, was deleted; name a version with kasa promote"
        )
    registry.check_files(version)
    events = [event(back, "made champion again", user_name(), words)]
    if champion := moves[PREVIOUS]:
        events.append(event(champion, "rolled back", user_name(), words))
    change_aliases(registry, name, moves, events)
    return _change(registry, workspace, name, aliases.get(CHAMPION), words)


def _change(registry: Registry, workspace: Path, name: str, before: str | None, reason: str) -> Change:
    now = registry.aliases(name)
    undo = shell_command("kasa", "rollback", name, *workspace_option(workspace)) if PREVIOUS in now else ""
    return Change(name, now[CHAMPION], now.get(PREVIOUS), before, reason, True, undo)


def _row(version: ModelVersion, aliases: Mapping[str, str]) -> ModelRow:
    tags = version.tags
    gate = json.loads(tags.get("kasa.gate", "{}"))
    metric = str(gate.get("metric", ""))
    against = gate.get("against", {})
    opponent = next((name for name in ("champion", "base") if name in against), "")
    value = tags.get(f"kasa.{metric}")
    return ModelRow(
        version=version,
        aliases=tuple(alias for alias, number in aliases.items() if number == version.version),
        decision=tags.get("kasa.decision", ""),
        reason=tags.get("kasa.reason", ""),
        metric=metric,
        value=float(value) if value else None,
        opponent=opponent,
        difference=Interval(**against[opponent][metric]) if opponent else None,
        history=history(version),
    )


def _words(reason: str | None) -> str:
    return " ".join((reason or "").split()) or _NO_REASON
