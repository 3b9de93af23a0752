"""A process that has imported torch, transformers, DeepSpeed, MLflow and this project once, and forks what tests start.

Before a fork runs its module it is given the working directory, environment, arguments, standard streams, module path and
random state that a fresh interpreter would have. Ray's own workers are forked as well: a raylet that is started from here
runs `fork_launcher.py` in the place of Ray's `setup_worker.py`.

These tests start true cold processes all the same: the first complete run of a workspace (the fixture `first`), the run for
which torch is forbidden, the jobs' drivers, the tests of Ray's start, and the servers of MLflow.

usage: python -m tests.support.fork_server OWNER_PROCESS SOCKET
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.forking import LARGEST_REQUEST, VARIABLE, note_environment, socket_path

ROOT = Path(__file__).resolve().parents[2]
_START_S = 120.0
# Nothing that starts a thread or touches a device: neither would live on in a fork.
_IMPORTED = (
    "scipy.stats", "datasets", "deepspeed", "mlflow.pyfunc", "peft",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "pipeline.cli.main", "pipeline.run.flow", "pipeline.training.worker", "pipeline.evaluation.worker",
)  # fmt: skip
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def ensure_server() -> None:
    """Start the session's server, unless it is there."""
    from filelock import FileLock

    path = socket_path()
    with FileLock(f"{path}.lock"):
        if path.exists():
            return
        log = path.with_suffix(".log")
        with log.open("wb") as out:
            server = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server", *os.environ[VARIABLE].split(":")],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not path.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no fork server: {log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        server.returncode = 0  # it ends with pytest, not with this process


def _environment() -> dict[str, str]:
    """What everything is imported in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_", "KASA_"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _import_everything() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    # Ray reads its job's id and all its settings from the environment when it is imported, so a fork must do that itself.
    assert "ray" not in sys.modules, "the fork server has imported Ray"


class _WorkersAreForked:
    """Has a raylet that this process starts run our launcher, once Ray is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "ray._private.ray_constants":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        execute = spec.loader.exec_module  # type: ignore[union-attr]

        def execute_and_change(module: Any) -> None:
            execute(module)
            # An absolute path, so that joining it to the folder of Ray's script gives it as it is.
            module.SETUP_WORKER_FILENAME = str(ROOT / "tests" / "support" / "fork_launcher.py")

        spec.loader.exec_module = execute_and_change  # type: ignore[union-attr,method-assign]
        return spec


class _Child(Exception):  # noqa: N818
    """Raised in a new process, to leave the server's loop; holds the request."""


def _serve(path: str, owner: int) -> None:
    """Answer requests until the process `owner` has ended."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    children: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ, "request")
        selector.register(os.pidfd_open(owner), selectors.EVENT_READ, "owner")
        while True:
            for key, _ in selector.select():
                if key.data == "owner":
                    return
                if key.data == "request":
                    connection, _ = listener.accept()
                    pid, handle = _fork(connection, [listener, selector, *(one for _, one in children.values())])
                    children[handle] = pid, connection
                    selector.register(handle, selectors.EVENT_READ, handle)
                    selector.register(connection, selectors.EVENT_READ, handle)
                elif key.data in children:
                    pid, connection = children.pop(key.data)
                    selector.unregister(key.data)
                    selector.unregister(connection)
                    _end(pid, connection, is_left=key.fd != key.data)
                    os.close(key.data)


def _end(pid: int, connection: socket.socket, is_left: bool) -> None:
    """Report a process that has ended; end one whose connection was closed (`is_left`)."""
    if is_left:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):
        connection.send(str(status).encode())
    connection.close()


def _fork(connection: socket.socket, others: Sequence[Any]) -> tuple[int, int]:
    """Fork for a request; returns the process and a pidfd of it.

    Raises:
        _Child: in the new process.
    """
    message, streams, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, 3)
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        connection.send(str(pid).encode())
        return pid, os.pidfd_open(pid)
    for one in (connection, *others):
        one.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    raise _Child(json.loads(message))


def _become(request: Mapping[str, Any], added: Mapping[str, str], own_path: Sequence[str]) -> None:
    """Make this process what a fresh interpreter would be for the request.

    Args:
        request: as `forking.ask` sends it.
        added: what the imports have put into the environment.
        own_path: where modules are found besides PYTHONPATH.
    """
    import numpy as np
    import transformers
    from huggingface_hub import constants

    if request["new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update({**added, **request["environment"]})
    kind = request["arguments"][0]
    first = {"-m": os.getcwd(), "-c": ""}.get(kind, os.path.dirname(kind))
    given = os.environ.get("PYTHONPATH", "")
    sys.path[:] = [first, *filter(None, given.split(os.pathsep)), *own_path]
    sys.meta_path.insert(0, _WorkersAreForked())
    tempfile.tempdir = None
    np.random.seed()  # Python's own generator sees to itself
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, int(os.environ["MALLOC_MMAP_THRESHOLD_"]))
    sys.warnoptions[:] = filter(None, os.environ.get("PYTHONWARNINGS", "").split(","))
    for option in sys.warnoptions:
        warnings.simplefilter(option)  # all that the product sets is an action: ignore
    # Read during the imports, and set in Ray's workers alone.
    if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
        transformers.logging.set_verbosity_error()
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1":
        constants.HF_HUB_DISABLE_PROGRESS_BARS = True


def _run(arguments: Sequence[str]) -> None:
    """What `python ARGUMENTS` runs, as the module `__main__`."""
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.modules.pop(arguments[1], None)  # runpy warns of a module that was imported before
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def main() -> None:
    """Serve; in a forked process, run what was asked for."""
    before = dict(os.environ)
    note_environment(before)
    _import_everything()
    added = {name: value for name, value in os.environ.items() if name not in before}
    own_path = [path for path in sys.path if path not in ("", str(ROOT))]
    gc.collect()
    gc.freeze()
    try:
        _serve(sys.argv[2], int(sys.argv[1]))
        return
    except _Child as child:
        request = child.args[0]
    _become(request, added, own_path)
    _run(request["arguments"])


if __name__ == "__main__":
    main()
