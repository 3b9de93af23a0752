"""Start Python processes of this project as forks of a server that has imported everything once (`fork_server.py`).

A fork begins where the imports of torch, transformers, DeepSpeed and MLflow end, which take a fresh interpreter about
ten seconds. What is read before or during those imports cannot be changed afterwards: a process whose environment differs
from the server's in such a variable, or whose PYTHONPATH is not this project, is started as a fresh interpreter. So is
everything outside a pytest session, benchmarks above all.

This module imports nothing but the standard library: the launcher of Ray's workers (`fork_launcher.py`) uses it too.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# In the environment of a pytest session: `PROCESS:SOCKET`. The server ends with that process, pytest's own.
VARIABLE = "TEST_FORK_SERVER"
LARGEST_REQUEST = 2**22

# Prefixes of variables that are read when the interpreter, the C library or an imported module starts.
_READ_AT_START = (
    "PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "MKL_", "OPENBLAS_", "TORCH_", "CUDA_", "DS_", "HF_HOME", "HF_HUB_CACHE",
    "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS", "TRANSFORMERS_OFFLINE", "ARROW_",
)  # fmt: skip
# What the server can still set in a fork, and what is read when it is used.
_NOT_TOO_LATE = {"MALLOC_MMAP_THRESHOLD_", "PYTHONWARNINGS", "PYTHONBREAKPOINT"}


class ForkedProcess(subprocess.Popen[Any]):
    """A child of the server, with the interface of a child of this process.

    `args` is what follows the interpreter: `-m MODULE ARGUMENT...`, `-c CODE ARGUMENT...` or `SCRIPT ARGUMENT...`.
    """

    _connection: socket.socket

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments).arguments  # type: ignore[attr-defined]
        sys.audit("subprocess.Popen", sys.executable, given["args"], given["cwd"], given["env"])  # as its own does
        with open(os.devnull, "rb") as nothing:
            inherited = (nothing.fileno(), 1, 2)
            streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
            streams = [one if one >= 0 else other for one, other in zip(streams, inherited, strict=True)]
            self._connection, self.pid = ask(
                given["args"], given["cwd"] or os.getcwd(), given["env"], streams, given["start_new_session"]
            )
        self._child_created = True
        for mine, theirs in (("p2cwrite", "p2cread"), ("c2pread", "c2pwrite"), ("errread", "errwrite")):
            if given[mine] >= 0 <= given[theirs]:
                os.close(given[theirs])

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        self._connection.setblocking(not wait_flags & os.WNOHANG)
        try:
            said = self._connection.recv(64)
        except BlockingIOError:
            return 0, 0
        return self.pid, int(said or signal.SIGKILL)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode

    def _handle_exitstatus(self, status: int, *_: Any) -> None:
        self.returncode = os.waitstatus_to_exitcode(status)
        self._connection.close()


def start_python(
    arguments: Sequence[str], environment: Mapping[str, str], is_cold: bool = False, **options: Any
) -> subprocess.Popen[Any]:
    """`python ARGUMENTS`, forked from the server where that gives what a fresh interpreter would.

    Args:
        arguments: `-m MODULE ARGUMENT...`, `-c CODE ARGUMENT...` or `SCRIPT ARGUMENT...`.
        environment: all of it.
        is_cold: never a fork.
        options: of `subprocess.Popen`: `cwd`, `stdin`, `stdout`, `stderr`, `text`, `start_new_session`.
    """
    if VARIABLE in os.environ and not is_cold:
        from tests.support.fork_server import ensure_server

        ensure_server()
        environment = {**environment, VARIABLE: os.environ[VARIABLE]}
        if is_forkable(environment):
            return ForkedProcess(list(arguments), env=environment, **options)
    # Shells let what they start in the background ignore Ctrl-C, and that is inherited.
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        **options,
    )


def socket_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the session's server listens."""
    return Path(environment[VARIABLE].partition(":")[2])


def worker_note(launcher: int) -> Path:
    """Where a launcher of Ray's writes down, as long as it lasts, which process it has got."""
    return socket_path().with_name(f"worker-of-{launcher}")


def forked_worker(launcher: int) -> int | None:
    """The process that a launcher has got; None for other processes."""
    try:
        return int(worker_note(launcher).read_text(encoding="utf-8") or 0) or None
    except (KeyError, FileNotFoundError):
        return None


def note_environment(environment: Mapping[str, str]) -> None:
    """Write down what the server's imports are about to read."""
    _note(environment).write_text(json.dumps(_read_at_start(environment)), encoding="utf-8")


def is_forkable(environment: Mapping[str, str]) -> bool:
    """Whether a process of that environment can be a fork: it must not differ in what the server's imports have read."""
    try:
        servers = json.loads(_note(environment).read_text(encoding="utf-8"))
    except (KeyError, FileNotFoundError):
        return False
    # The product sets MKL's to the same as OMP's.
    defaults = {"MKL_NUM_THREADS": "1"}
    if "RAY_ADDRESS" in environment:
        del defaults["RAY_AUTH_MODE"]  # as that cluster has it
    return defaults | _read_at_start(environment) == servers | {"MKL_NUM_THREADS": "1"}


def _note(environment: Mapping[str, str]) -> Path:
    return socket_path(environment).with_suffix(".environment")


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    names = [name for name in environment if name.startswith(_READ_AT_START) and name not in _NOT_TOO_LATE]
    return {name: environment[name] for name in names}


def ask(
    arguments: Sequence[str],
    folder: str | Path,
    environment: Mapping[str, str],
    streams: Sequence[int],
    new_session: bool,
) -> tuple[socket.socket, int]:
    """Have a process forked; returns a connection and its process number.

    The connection tells the wait status of the process at its end. Closed before, it ends the process.
    """
    request = {
        "arguments": [str(one) for one in arguments],
        "folder": str(folder),
        "environment": dict(environment),
        "new_session": new_session,
    }
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_REQUEST)
    connection.connect(str(socket_path(environment)))
    socket.send_fds(connection, [json.dumps(request).encode()], list(streams))
    return connection, int(connection.recv(64))
