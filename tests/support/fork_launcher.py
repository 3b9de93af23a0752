"""Starts a Ray worker by a fork: the raylet runs this in the place of Ray's `setup_worker.py`, with the same arguments.

It imports nothing of Ray's, waits for the worker and ends as it does. The worker tells the raylet its own process number;
a launcher that is killed takes the worker with it. What cannot be a fork is left to Ray's own script.
"""

from __future__ import annotations

import json
import os
import sys

import forking


def main() -> None:
    """Ask for the worker, or become Ray's script."""
    context, language, passed = {}, "", []
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value)
        elif name == "--language":
            language = value
        else:
            passed.append(argument)
    environment = {**os.environ, **context.pop("env_vars", {})}
    is_plain = context.pop("py_executable", sys.executable) == sys.executable and not any(context.values())
    if language != "PYTHON" or not is_plain or not forking.is_forkable(environment):
        script = os.path.join(os.path.dirname(passed[0]), "setup_worker.py")
        os.execv(sys.executable, [sys.executable, script, *sys.argv[1:]])
    # The raylet ends a worker by a signal to its whole process group, which must not be the server's.
    connection, worker = forking.ask(passed, os.getcwd(), environment, (0, 1, 2), new_session=True)
    note = forking.worker_note(os.getpid())
    note.write_text(str(worker), encoding="utf-8")
    status = connection.recv(64)
    note.unlink(missing_ok=True)
    sys.exit(os.waitstatus_to_exitcode(int(status or b"9")) & 255)


main()
