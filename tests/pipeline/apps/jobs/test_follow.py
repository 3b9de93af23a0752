"""Following a job over a connection that breaks."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from pipeline.apps.job_client import JobState
from pipeline.apps.submit import exit_code_of, follow
from pipeline.core.errors import ConnectionLostError

LOG = [f"line {n}\n" for n in range(8)]
RUNNING, DONE = JobState("RUNNING", None, ""), JobState("SUCCEEDED", 0, "")


@dataclass
class Line:
    """A connection that gives `visits` pieces of the log, one number a visit, and breaks where it says so."""

    visits: list[int]
    states: list[JobState | None]
    complete: bool = True
    said: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def state(self, submission_id: str) -> JobState:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state is None:
            raise ConnectionLostError("no answer")
        return state

    def whole_log(self, submission_id: str) -> str:
        if not self.complete:
            raise ConnectionLostError("node is gone")
        return "".join(LOG)

    async def log_pieces(self, submission_id: str) -> AsyncIterator[str]:
        count = self.visits.pop(0) if self.visits else 0
        for piece in LOG[:count]:
            yield piece
        if count < len(LOG):
            raise ConnectionLostError("broken pipe")

    def follow(self, patience_s: float = 5) -> JobState:
        return follow(self, "job", self.written.append, self.said.append, patience_s, pause_s=0.01)


def test_a_broken_connection_repeats_nothing_and_loses_nothing() -> None:
    line = Line(visits=[3, 0, 2, 5, 8], states=[DONE])
    assert line.follow() == DONE
    assert "".join(line.written) == "".join(LOG)
    assert len(line.said) == 1


def test_a_log_that_ends_before_the_job_does() -> None:
    line = Line(visits=[8, 8], states=[RUNNING, DONE])
    assert line.follow() == DONE
    assert "".join(line.written) == "".join(LOG)


def test_the_end_of_the_log_is_fetched_if_the_connection_does_not_bring_it() -> None:
    line = Line(visits=[2], states=[DONE])
    line.log_pieces = _two_pieces  # type: ignore[method-assign]
    line.follow()
    assert "".join(line.written) == "".join(LOG)


async def _two_pieces(submission_id: str) -> AsyncIterator[str]:
    for piece in LOG[:2]:
        yield piece


def test_a_job_whose_node_is_gone_still_has_an_end() -> None:
    assert Line(visits=[8], states=[JobState("FAILED", None, "node died")], complete=False).follow().status == "FAILED"


def test_a_dashboard_that_stays_away() -> None:
    line = Line(visits=[3], states=[None])
    with pytest.raises(ConnectionLostError):
        line.follow(patience_s=0.1)
    assert "trying again" in line.said[0]


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (DONE, 0),
        (JobState("FAILED", 2, ""), 2),
        (JobState("FAILED", 1, ""), 1),
        (JobState("FAILED", -9, ""), 1),
        (JobState("FAILED", 137, ""), 1),
        (JobState("FAILED", None, "supervisor died"), 1),
        (JobState("FAILED", 0, "supervisor died"), 1),
        (JobState("STOPPED", None, ""), 1),
        (JobState("STOPPED", 2, ""), 1),
    ],
)
def test_exit_codes(state: JobState, code: int) -> None:
    assert exit_code_of(state) == code
