"""A real PostgreSQL on a free port of loopback, for the time of a test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.tracking_server import free_port

PATIENCE_S = 120
# PostgreSQL refuses to run as root; Debian's package brings this user.
USER = "postgres"


class Postgres:
    """A server with one database.

    Attributes:
        uri: for SQLAlchemy.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self._data, self._programs, self._port = folder / "data", programs, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"postgresql+psycopg2://{USER}@127.0.0.1:{self._port}/postgres"
        self._run("initdb", "-D", str(self._data), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync")

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        options = ["-D", str(self._data), "-p", str(self._port), "-h", "127.0.0.1", "-k", str(self._data), "-F"]
        self._process = subprocess.Popen([self._programs / "postgres", *options], **self._as_user())
        deadline = time.monotonic() + PATIENCE_S
        ready = [self._programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        while subprocess.run(ready, check=False).returncode:
            assert self._process.poll() is None, "postgres ended"
            assert time.monotonic() < deadline, "postgres does not answer"
            time.sleep(0.1)

    def stop(self) -> None:
        """End it and its connections at once."""
        if self._process:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(PATIENCE_S)
            self._process = None

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run([self._programs / program, *arguments], check=True, **self._as_user())

    def _as_user(self) -> dict[str, object]:
        quiet: dict[str, object] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
        return quiet | ({"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {})


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server that runs within the block; the test is skipped where there is no PostgreSQL."""
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL on this machine (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="kasa-postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, USER, USER)
        server = Postgres(folder, programs)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def find_programs() -> Path | None:
    """The folder of the newest PostgreSQL's programs."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    installed = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(installed, key=lambda folder: int(folder.parent.name), default=None)
