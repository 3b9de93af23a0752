"""Following a job to its end, over a connection that may break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

from pipeline.apps.jobs.attempts import STOPPED, SUCCEEDED
from pipeline.apps.jobs.client import JobState
from pipeline.core.errors import ConnectionLostError

# Seconds that a dashboard may be away, and seconds between attempts to reach it.
PATIENCE_S, PAUSE_S = 60.0, 2.0
# After so many silent seconds the job's state is asked for: a broken connection is silent too.
_SILENCE_S = 15.0


class Followed(Protocol):
    """The part of `pipeline.apps.jobs.client.Dashboard` that following a job needs."""

    def state(self, submission_id: str) -> JobState: ...
    def whole_log(self, submission_id: str) -> str: ...
    def log_pieces(self, submission_id: str) -> AsyncIterator[str]: ...


def follow(
    dashboard: Followed,
    job: str,
    write: Callable[[str], None],
    say: Callable[[str], None],
    patience_s: float = PATIENCE_S,
    pause_s: float = PAUSE_S,
) -> JobState:
    """Pass on what a job writes, each part once, until the job ends.

    Args:
        dashboard: the cluster.
        job: submission id of the job.
        write: takes pieces of the log.
        say: takes remarks on the connection.
        patience_s: seconds that the dashboard may be away.
        pause_s: seconds between attempts to reach it.

    Raises:
        ConnectionLostError: the dashboard stayed away for `patience_s`.
    """
    return asyncio.run(_Follower(dashboard, job, write).to_the_end(say, patience_s, pause_s))


def exit_code_of(state: JobState) -> int:
    """The exit code of an ended job: that of its command, or 1 where a signal or the cluster ended it."""
    if state.status == SUCCEEDED:
        return 0
    code = state.exit_code or 1
    return code if state.status != STOPPED and 0 < code < 126 else 1


class _Follower:
    def __init__(self, dashboard: Followed, job: str, write: Callable[[str], None]) -> None:
        self._dashboard, self._job, self._write = dashboard, job, write
        self._written = 0

    async def to_the_end(self, say: Callable[[str], None], patience_s: float, pause_s: float) -> JobState:
        lost_since: float | None = None
        while True:
            try:
                await self._pass_on()
                state = await asyncio.to_thread(self._dashboard.state, self._job)
                if state.ended:
                    await self._rest()
                    return state
                lost_since = None
            except ConnectionLostError as error:
                if lost_since is None:
                    lost_since = time.monotonic()
                    say(f"the connection to the dashboard is lost ({error}); trying again for {patience_s:g} s")
                elif time.monotonic() - lost_since > patience_s:
                    raise
            await asyncio.sleep(pause_s)

    async def _pass_on(self) -> None:
        """Pass the log on until it ends, or until the job turns out to have ended silently."""
        pieces = self._dashboard.log_pieces(self._job)
        position = 0  # a log is always sent from its beginning
        coming = asyncio.ensure_future(anext(pieces, None))
        try:
            while True:
                done, _ = await asyncio.wait([coming], timeout=_SILENCE_S)
                if not done:
                    if (await asyncio.to_thread(self._dashboard.state, self._job)).ended:
                        return
                    continue
                piece = coming.result()
                if piece is None:
                    return
                new = piece[max(0, self._written - position) :]
                position += len(piece)
                if new:
                    self._write(new)
                    self._written += len(new)
                coming = asyncio.ensure_future(anext(pieces, None))
        finally:
            coming.cancel()
            with suppress(asyncio.CancelledError, ConnectionLostError):
                await coming

    async def _rest(self) -> None:
        # The job's node may be gone, and its log with it.
        with suppress(ConnectionLostError):
            if rest := (await asyncio.to_thread(self._dashboard.whole_log, self._job))[self._written :]:
                self._write(rest)
                self._written += len(rest)
