"""Ctrl-C and SIGTERM in processes that do what keeps a process from ending."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.core import stopping

PROGRAM = """
import os, signal, subprocess, sys, threading, time, types
from concurrent.futures import ThreadPoolExecutor
from pipeline.core import stopping

stopping.shutil.which = str
stopping.GRACE_S, stopping.DUTIES_S = 0.5, 0.5
sleepers = subprocess.Popen(["sh", "-c", "sleep 300 & exec sleep 300"])

def ready():
    # The signal comes as soon as this is read: what is to meet it stands around this call.
    print(sleepers.pid, flush=True)

def in_order():
    try:
        ready()
        stopping.pause(300)
    finally:
        print("in order", flush=True)

def in_order_where_the_listener_is_late():
    stopping.GRACE_S = 10
    late = lambda *arguments: (time.sleep(0.8), os.read(*arguments))[1]
    stopping.os = types.SimpleNamespace(**vars(os) | {"read": late})
    try:
        ready()
        time.sleep(300)
    finally:
        time.sleep(1.5)
        print("in order", flush=True)

def in_an_endless_call():
    ready()
    stopping.aside(threading.Event().wait)

def behind_a_handler_of_a_library():
    signal.signal(signal.SIGINT, lambda *_: None)
    ready()
    time.sleep(300)

def waiting_for_another_thread():
    try:
        ready()
        time.sleep(300)
    finally:
        threading.Event().wait()

def in_a_thread():
    def work():
        ready()
        while True:
            stopping.pause(300)
    with ThreadPoolExecutor() as threads:
        threads.submit(work).result()

def asking():
    try:
        ready()
        time.sleep(300)
    except KeyboardInterrupt:
        with stopping.held("the job goes on"):
            print("asking", flush=True)
            time.sleep(300)

owed = stopping.otherwise(lambda: print("owed", flush=True))
with stopping.on_signals(["/bin/kasa", "run", "my recipe.yaml"]), owed:
    globals()[sys.argv[1]]()
"""
USUAL = "stopped; the same command goes on: kasa run 'my recipe.yaml'\n"


def start(what: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stdout is not None
    sleeper = psutil.Process(int(process.stdout.readline()))
    while not sleeper.children():
        time.sleep(0.01)
    return process, [sleeper, *sleeper.children()]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "signum", "code", "printed"),
    [
        ("in_order", signal.SIGTERM, 143, "in order\n"),
        ("in_order", signal.SIGINT, 130, "in order\n"),
        ("in_order", signal.SIGHUP, 129, "in order\n"),
        ("in_order_where_the_listener_is_late", signal.SIGINT, 130, "in order\n"),
        ("in_an_endless_call", signal.SIGINT, 130, ""),
        ("in_a_thread", signal.SIGINT, 130, ""),
        ("behind_a_handler_of_a_library", signal.SIGINT, 130, "owed\n"),
        ("waiting_for_another_thread", signal.SIGTERM, 143, "owed\n"),
    ],
)
def test_a_signal_ends_a_command_and_all_beneath_it(what: str, signum: int, code: int, printed: str) -> None:
    process, beneath = start(what)
    process.send_signal(signum)
    began = time.monotonic()
    assert process.communicate(timeout=60) == (printed, USUAL)
    assert time.monotonic() - began < 10
    assert process.returncode == code
    _, alive = psutil.wait_procs(beneath, timeout=10)
    assert not alive


@pytest.mark.processes
def test_a_second_signal_ends_it_at_once() -> None:
    process, beneath = start("asking")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "asking\n"
    time.sleep(1)  # longer than the grace, and than one Ctrl-C that is delivered twice
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "the job goes on\n")
    assert process.returncode == 130
    assert not psutil.wait_procs(beneath, timeout=10)[1]


def test_without_a_signal_nothing_differs() -> None:
    assert stopping.aside(lambda: 41 + 1) == 42
    with pytest.raises(ZeroDivisionError):
        stopping.aside(lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        stopping.aside(lambda: _raise(TimeoutError()))
    stopping.check()
    stopping.pause(0)
    before = signal.getsignal(signal.SIGTERM)
    with stopping.on_signals(["kasa"]), stopping.otherwise(lambda: pytest.fail("done though nothing has ended")):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert not stopping.requested()


def _raise(error: Exception) -> None:
    raise error


def test_what_is_beneath_a_process_is_killed_to_the_last(tmp_path: Path) -> None:
    script = tmp_path / "tree.sh"
    script.write_text('sh -c "sleep 300 & sleep 300 & wait" & sleep 300 & wait\n', encoding="utf-8")
    with subprocess.Popen(["sh", str(script)]) as parent:
        found: list[psutil.Process] = []
        while len(found) < 4:
            found = psutil.Process(parent.pid).children(recursive=True)
        stopping.kill_beneath(parent.pid, patience_s=10)
        assert not psutil.wait_procs(found, timeout=10)[1]
        parent.kill()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["run", "my recipe.yaml", "workspace=w s;x"], "kasa run 'my recipe.yaml' 'workspace=w s;x'"),
        (["run", "r.yaml", "data.max_tokens=64"], "kasa run r.yaml data.max_tokens=64"),
        (["run", "r.yaml", "data.train=https://host/rows.jsonl"], "kasa run r.yaml data.train=https://host/rows.jsonl"),
        (["run", "r.yaml", "data.train=https://host/rows.jsonl?sig=abc"], ""),
        (["run", "r.yaml", "data.train=https://alice:pw@host/rows.jsonl"], ""),
        (["submit", "r.yaml", "--env", "HF_TOKEN=abc"], ""),
    ],
)
def test_it_can_be_typed_again_and_holds_no_secret(
    arguments: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/somewhere/{name}")
    assert stopping.command_line(["/somewhere/kasa", *arguments]) == shown
    assert stopping.command_line(["/checkout/pipeline/cli/main.py", *arguments]) == shown
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert stopping.command_line([".venv/bin/kasa", *arguments]) == shown.replace("kasa run", ".venv/bin/kasa run")
