"""What a scheduler's SIGTERM leaves behind."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import time
from pipeline.cli.main import end_on_sigterm
end_on_sigterm()
try:
    print("at work", flush=True)
    time.sleep(60)
finally:
    print("in order")
"""


@pytest.mark.processes
def test_sigterm_ends_a_command_in_order() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.terminate()
    assert process.communicate(timeout=120) == ("in order\n", None)
    assert process.returncode == 143
