"""Which version carries which alias after which event: pure functions from aliases to the aliases to be changed.

`champion` is the version in use, `previous` the champion before it, `challenger` the newest version that was kept out.

Moving aliases so that nobody is left in between: what is intended is written down first, then done, then crossed out.

The intention is a tag of the registered model. Whoever opens the model next, after a death in the middle, does the rest:
every part may be done twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.core.errors import ModelError
from pipeline.registry.store import CHALLENGER, CHAMPION, PREVIOUS, ModelVersion, Registry

# Alias -> version; None takes the alias away. In the order in which they are to be written: whoever dies in between
# leaves a champion.
AliasChanges = dict[str, str | None]


def after_keeping_out(aliases: Mapping[str, str], version: str) -> AliasChanges:
    """A version was registered and not promoted."""
    newest = int(aliases.get(CHALLENGER, "0")) < int(version)
    return {CHALLENGER: version} if newest and version not in (aliases.get(CHAMPION), aliases.get(PREVIOUS)) else {}


def after_promotion(aliases: Mapping[str, str], version: str) -> AliasChanges:
    """A version becomes the champion, and the champion the previous one."""
    moves: AliasChanges = {}
    champion = aliases.get(CHAMPION)
    if champion != version:
        if champion is not None:
            moves[PREVIOUS] = champion
        elif aliases.get(PREVIOUS) == version:
            moves[PREVIOUS] = None
        moves[CHAMPION] = version
    if aliases.get(CHALLENGER) == version:
        moves[CHALLENGER] = None
    return moves


def after_rollback(aliases: Mapping[str, str], name: str) -> AliasChanges:
    """The previous champion is the champion again, and the other way round: twice leads back.

    Raises:
        ModelError: there is nothing to go back to.
    """
    champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    if previous is None or previous == champion:
        there = f"version {champion} is its first champion" if champion else "it never had a champion"
        raise ModelError(f"{name} has no previous champion to go back to: {there}; name a version with kasa promote")
    return {PREVIOUS: champion, CHAMPION: previous}


HISTORY = "kasa.history"
_INTENDED = "kasa.intended_move"


@dataclass(frozen=True)
class Event:
    """What happened to a version.

    Attributes:
        version: its number.
        what: `kept out`, `promoted`, `replaced`, `rolled back` or `restored`.
        by: who did it: a person, or `gate`.
        reason: in words.
        at: when, ISO 8601 in UTC.
    """

    version: str
    what: str
    by: str
    reason: str
    at: str


def event(version: str, what: str, by: str, reason: str) -> Event:
    """An event of this moment."""
    return Event(version, what, by, reason, datetime.now(UTC).isoformat(timespec="milliseconds"))


def change_aliases(registry: Registry, name: str, aliases: Mapping[str, str | None], events: list[Event]) -> None:
    """Set aliases (or take them away: None), in the order given, and record the events on their versions."""
    intended = {"aliases": list(aliases.items()), "events": [asdict(one) for one in events]}
    registry.client.set_registered_model_tag(name, _INTENDED, json.dumps(intended))
    finish_interrupted_change(registry, name)


def finish_interrupted_change(registry: Registry, name: str) -> None:
    """Do the rest of a move that was begun and not ended, if there is one."""
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
    """What happened to a version, oldest first, as JSON values."""
    return list(json.loads(version.tags.get(HISTORY, "[]")))


def _record(registry: Registry, version: ModelVersion, one: Event) -> None:
    known, new = history(version), asdict(one)
    del new["version"]
    line = f"- {one.at[:16].replace('T', ' ')} UTC: {one.what} by {one.by}: {one.reason}"
    if line not in version.description:
        registry.describe(version, f"{version.description.rstrip()}\n{line}\n")
    if new not in known:
        registry.tag_version(version, {HISTORY: json.dumps([*known, new])})
