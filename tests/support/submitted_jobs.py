"""`kasa submit` to a real Ray head: started, followed to its end, and watched."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.files import read_journal
from tests.support import ROOT
from tests.support.processes import KASA
from tests.support.ray_head import Head, plain_environment

PATIENCE_S = 400.0


@dataclass(frozen=True)
class Jobs:
    """A folder with the tiny inputs, and the head that its recipe is sent to."""

    folder: Path
    head: Head

    def start(
        self, workspace: str, *arguments: str, address: str = "", terminal: int | None = None
    ) -> subprocess.Popen[str]:
        """`kasa submit recipe.yaml --json` with a workspace in the folder; `terminal` is its stdin and stderr."""
        submit = [
            sys.executable,
            str(KASA),
            "submit",
            "recipe.yaml",
            f"workspace={self.folder / workspace}",
        ]
        return subprocess.Popen(
            [*submit, *arguments, "--address", address or self.head.address, "--json"],
            cwd=self.folder,
            env={**plain_environment(), **self.head.environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            start_new_session=True,
            # Shells let what they start in the background ignore Ctrl-C, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )

    def submit(self, workspace: str, *arguments: str) -> Said:
        """The same, to its end."""
        return finish(self.start(workspace, *arguments))

    def statuses(self) -> dict[str, str]:
        """All jobs on the head, by Ray's own client."""
        script = (
            "import json, sys; from ray.job_submission import JobSubmissionClient as C; "
            "print(json.dumps({j.submission_id: str(j.status) for j in C(sys.argv[1]).list_jobs() if j.submission_id}))"
        )
        environment = {**plain_environment(), **self.head.environment}
        command = [sys.executable, "-c", script, self.head.address]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
        return json.loads(out.splitlines()[-1])

    def steps(self, workspace: str) -> int:
        """How far the training in progress is."""
        files = list((self.folder / workspace / "artifacts" / "train").glob("*.partial/journal.jsonl"))
        return max((record.get("step", 0) for file in files for record in read_journal(file)), default=0)

    def wait(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """Until the condition holds; the process must live until then."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"seen too late, or not at all: {finish(process)}")
            time.sleep(0.02)


@dataclass(frozen=True)
class Said:
    """How `kasa submit` ended: exit code, its JSON object, the job's log and what it said itself."""

    code: int
    result: Mapping[str, object]
    log: str
    messages: str


def finish(process: subprocess.Popen[str]) -> Said:
    """Wait for the end of `Jobs.start`."""
    out, err = process.communicate(timeout=PATIENCE_S)
    log, _, last = out.rstrip("\n").rpartition("\n")
    result = json.loads(last) if last.startswith("{") else {}
    return Said(process.returncode, result, log if result else out, err or "")


def hear(terminal: int, until: str) -> str:
    """What a terminal shows until some words appear, for a minute at most."""
    heard, deadline = "", time.monotonic() + 60
    while until not in heard and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                heard += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                break
    return heard
