"""How aliases of a registered model change, and the history of its versions.

Pure functions say which aliases an event changes. The registry offers no transaction, so an intended change is first written
to a tag of the registered model, then made, and then the tag is deleted. After a crash in between, whoever opens the model
next finishes the change: every step may be repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.core.errors import ModelError
from pipeline.registry.store import CHALLENGER, CHAMPION, PREVIOUS, ModelVersion, Registry

HISTORY = "kasa.history"
_INTENDED = "kasa.intended_move"
# Alias -> version; None deletes the alias. In the order of writing, by which a crash in between always leaves a champion.
AliasChanges = dict[str, str | None]


def after_keeping_out(aliases: Mapping[str, str], version: str) -> AliasChanges:
    """The changes after a version was registered and not promoted."""
    newest = int(aliases.get(CHALLENGER, "0")) < int(version)
    return {CHALLENGER: version} if newest and version not in (aliases.get(CHAMPION), aliases.get(PREVIOUS)) else {}


def after_promotion(aliases: Mapping[str, str], version: str) -> AliasChanges:
    """The changes that make a version the champion, and the champion the previous one."""
    changes: AliasChanges = {}
    champion = aliases.get(CHAMPION)
    if champion != version:
        if champion is not None:
            changes[PREVIOUS] = champion
        elif aliases.get(PREVIOUS) == version:
            changes[PREVIOUS] = None
        changes[CHAMPION] = version
    if aliases.get(CHALLENGER) == version:
        changes[CHALLENGER] = None
    return changes


def after_rollback(aliases: Mapping[str, str], name: str) -> AliasChanges:
    """The changes that swap the champion and the previous one. Doing it twice leads back.

    Raises:
        ModelError: There is no previous champion.
    """
    champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    if previous is None or previous == champion:
        there = f"version {champion} is its first champion" if champion else "it never had a champion"
        raise ModelError(f"{name} has no previous champion to go back to: {there}; name a version with kasa promote")
    return {PREVIOUS: champion, CHAMPION: previous}


@dataclass(frozen=True)
class Event:
    """An event in the history of a version.

    Attributes:
        version: The number of the version.
        what: `kept out`, `promoted`, `replaced`, `rolled back` or `restored`.
        by: The person who did it, or `gate`.
        reason: Why, in words.
        at: The time in UTC, ISO 8601.
    """

    version: str
    what: str
    by: str
    reason: str
    at: str


def event(version: str, what: str, by: str, reason: str) -> Event:
    """An event that happens now."""
    return Event(version, what, by, reason, datetime.now(UTC).isoformat(timespec="milliseconds"))


def change_aliases(registry: Registry, name: str, changes: Mapping[str, str | None], events: list[Event]) -> None:
    """Make the changes in the order given, and record the events in the histories of their versions."""
    intended = {"aliases": list(changes.items()), "events": [asdict(one) for one in events]}
    registry.client.set_registered_model_tag(name, _INTENDED, json.dumps(intended))
    finish_interrupted_change(registry, name)


def finish_interrupted_change(registry: Registry, name: str) -> None:
    """Finish the change of aliases that a crash interrupted, if there is one."""
    model = registry.registered_model(name)
    text = model.tags.get(_INTENDED) if model else None
    if not text:
        return
    intended = json.loads(text)
    for alias, version in intended["aliases"]:
        if version is None:
            registry.client.delete_registered_model_alias(name, alias)
        elif registry.version(name, version):  # it may have been deleted meanwhile
            registry.client.set_registered_model_alias(name, alias, version)
    for one in intended["events"]:
        if version := registry.version(name, one["version"]):
            _record(registry, version, Event(**one))
    registry.client.delete_registered_model_tag(name, _INTENDED)


def history(version: ModelVersion) -> list[dict[str, Any]]:
    """The events in the history of a version, oldest first, as JSON values."""
    return list(json.loads(version.tags.get(HISTORY, "[]")))


def _record(registry: Registry, version: ModelVersion, one: Event) -> None:
    known, new = history(version), asdict(one)
    del new["version"]
    line = f"- {one.at[:16].replace('T', ' ')} UTC: {one.what} by {one.by}: {one.reason}"
    if line not in version.description:
        registry.describe(version, f"{version.description.rstrip()}\n{line}\n")
    if new not in known:
        registry.tag_version(version, {HISTORY: json.dumps([*known, new])})
