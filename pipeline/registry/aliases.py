"""Which version carries which alias after which event: pure functions from aliases to the aliases to be changed.

`champion` is the version in use, `previous` the champion before it, `challenger` the newest version that was kept out.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import ModelError

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"

# Alias -> version; None takes the alias away. In the order in which they are to be written: whoever dies in between
# leaves a champion.
Moves = dict[str, str | None]


def after_keeping_out(aliases: Mapping[str, str], version: str) -> Moves:
    """A version was registered and not promoted."""
    newest = int(aliases.get(CHALLENGER, "0")) < int(version)
    return {CHALLENGER: version} if newest and version not in (aliases.get(CHAMPION), aliases.get(PREVIOUS)) else {}


def after_promotion(aliases: Mapping[str, str], version: str) -> Moves:
    """A version becomes the champion, and the champion the previous one."""
    moves: Moves = {}
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


def after_rollback(aliases: Mapping[str, str], name: str) -> Moves:
    """The previous champion is the champion again, and the other way round: twice leads back.

    Raises:
        ModelError: there is nothing to go back to.
    """
    champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    if previous is None or previous == champion:
        there = f"version {champion} is its first champion" if champion else "it never had a champion"
        raise ModelError(f"{name} has no previous champion to go back to: {there}; name a version with kasa promote")
    return {PREVIOUS: champion, CHAMPION: previous}
