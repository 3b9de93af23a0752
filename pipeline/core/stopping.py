"""Ctrl-C, SIGTERM and a closed terminal: how a command ends in order within seconds and leaves no process behind.

The first signal raises `Stopped` in the main thread; loops of other threads ask `check`. What unwinds then marks its runs and
gives its locks back. A thread of its own hears the signals as well, through the C handler alone: should the main thread be
inside of a library, or a library have put a handler of its own in place, it ends the process after `GRACE_S`, having done what
`otherwise` was given. A second signal ends the process at once. Everything is written so that a kill loses nothing.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from pipeline.core.console import ProgressBars, console
from pipeline.core.redaction import redacted

Result = TypeVar("Result")

# For what unwinds; then for what was registered; for the last words; for processes to be gone. Well below ten seconds in all.
GRACE_S, DUTIES_S, WORDS_S, DEATH_S = 4.0, 1.5, 0.5, 1.0
# A terminal and a program that passes signals on may both deliver one Ctrl-C.
_SAME_SIGNAL_S = 0.3
_POLL_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PROCESSES = Path("/proc")
# Whether `end` leaves no process of this one's own behind.
KILLS_BENEATH = (_PROCESSES / "self" / "stat").exists()


class Stopped(KeyboardInterrupt):
    """This process has been asked to stop by a signal."""


@dataclass
class _Stop:
    """The state of this process; there is one.

    Attributes:
        command: by which the user goes on; empty if it must not be shown.
        handled: the signals that this process ends on.
        signal: the first signal, if one has come.
        asked: whether one has come.
        raised: whether the main thread has been told.
        deadline: when the grace is over, on the monotonic clock.
        words: what is said at the end in place of the usual.
        duties: what an end without unwinding still owes.
        ending: held by the thread that ends the process.
    """

    command: str = ""
    handled: tuple[signal.Signals, ...] = ()
    signal: int | None = None
    asked: threading.Event = field(default_factory=threading.Event)
    raised: bool = False
    deadline: float = float("inf")
    words: str | None = None
    duties: list[Callable[[], None]] = field(default_factory=list)
    ending: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, signum: int) -> None:
        if self.signal is None:
            self.deadline = time.monotonic() + GRACE_S
            self.signal = signum
            self.asked.set()


_stop = _Stop()


@contextmanager
def on_signals(arguments: Sequence[str]) -> Iterator[None]:
    """A block, in the main thread, in which SIGINT, SIGTERM and SIGHUP stop this process as described above.

    Args:
        arguments: `sys.argv`, for the last line that is printed: by what the user goes on.
    """
    if _stop.handled:  # a block around this one sees to it
        yield
        return
    _stop.command = command_line(arguments)
    # One that is ignored stays so, as in the background job of a shell.
    before = {one: signal.getsignal(one) for one in _SIGNALS if signal.getsignal(one) != signal.SIG_IGN}
    _stop.handled = tuple(before)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    keep_handlers()
    wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard,), name="stopping", daemon=True).start()
    try:
        yield
    finally:
        if requested():
            end()
        signal.set_wakeup_fd(wakeup)
        _stop.handled = ()
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(told)


def command_line(arguments: Sequence[str]) -> str:
    """The command as it can be typed again; empty where an argument may hold a login or a token, which no log must show."""
    if any(redacted(argument) != argument for argument in arguments[1:]):
        return ""
    named = Path(arguments[0]).name == "kasa" and not shutil.which("kasa")
    return shlex.join([arguments[0] if named else "kasa", *arguments[1:]])


def keep_handlers() -> None:
    """Put the handlers of `on_signals` back in the first place; in the main thread, for elsewhere that is not allowed.

    Ray's core puts one before that of SIGTERM, which prints a stack.
    """
    if threading.current_thread() is threading.main_thread():
        for signum in _stop.handled:
            signal.signal(signum, _raise)


def requested() -> int | None:
    """The signal by which this process has been asked to stop, if it has been."""
    return _stop.signal


def check() -> None:
    """For loops in any thread.

    Raises:
        Stopped: this process has been asked to stop.
    """
    if requested():
        raise Stopped


def pause(seconds: float) -> None:
    """Sleep, in any thread.

    Raises:
        Stopped: this process has been asked to stop.
    """
    _stop.asked.wait(seconds)
    check()


def aside(call: Callable[[], Result]) -> Result:
    """The result of a long `call()` in a thread of its own, which is left alone there when this process is asked to stop.

    For calls into libraries that do not return on a signal, or that put handlers of their own in place where they can.

    Raises:
        Stopped: this process has been asked to stop.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="aside", daemon=True).start()
    while not wait([future], timeout=_POLL_S).done:
        check()
    return future.result()


@contextmanager
def otherwise(duty: Callable[[], None]) -> Iterator[None]:
    """A block whose end does `duty` in its own way; should the process end without unwinding, it is done before that."""
    _stop.duties.append(duty)
    try:
        yield
    finally:
        _stop.duties.remove(duty)


@contextmanager
def held(words: str) -> Iterator[None]:
    """A block after the first signal that may take its time, such as a question to the user.

    Args:
        words: what is said should a second signal end the process meanwhile.
    """
    _stop.deadline, _stop.words = float("inf"), words
    try:
        yield
    finally:
        _stop.deadline, _stop.words = time.monotonic() + GRACE_S, ""


def end() -> NoReturn:
    """End this process after a signal: say how to go on, kill all that is beneath it, exit with 128 + signal."""
    if not _stop.ending.acquire(blocking=False):
        threading.Event().wait()  # another thread is at it
    assert _stop.signal is not None
    _within(WORDS_S, [partial(_say_and_flush, _last_words())])
    kill_beneath(os.getpid(), DEATH_S)
    os._exit(128 + _stop.signal)


def kill_beneath(ancestor: int, patience_s: float) -> None:
    """SIGKILL every process beneath `ancestor`: a Ray of its own with the workers, and whatever else it has started.

    Each is halted before its children are looked for, so that none gets away by forking. The children of `ancestor` go last,
    when the deaths beneath them have been waited for, `patience_s` at most: Ray's core ends a process whose raylet has gone.
    """
    levels: list[list[int]] = []
    frontier = [ancestor]
    while frontier := [pid for pid in _children(frontier) if _send(pid, signal.SIGSTOP)]:
        levels.append(frontier)
    for level in reversed(levels):
        for pid in level:
            _send(pid, signal.SIGKILL)
        deadline = time.monotonic() + patience_s
        while level is not levels[0] and any(map(_lives, level)) and time.monotonic() < deadline:
            time.sleep(0.01)


def _raise(signum: int, frame: FrameType | None) -> None:
    _stop.ask(signum)
    if not _stop.raised:
        _stop.raised = True
        raise Stopped


def _watch(heard: int) -> None:
    first: float | None = None
    while True:
        ready, _, _ = select.select([heard], [], [], _POLL_S if requested() else None)
        signals = os.read(heard, 64) if ready else b""
        if ready and not signals:  # the block is over
            os.close(heard)
            return
        for signum in signals:
            if signum not in _stop.handled:
                continue
            # By when this thread heard the first one: on a busy machine the main thread may have been told long before.
            if first is not None and time.monotonic() - first > _SAME_SIGNAL_S:
                end()
            first = first or time.monotonic()
            _stop.ask(signum)
        if time.monotonic() > _stop.deadline:
            _within(DUTIES_S, list(_stop.duties))
            end()


def _within(patience_s: float, calls: Sequence[Callable[[], None]]) -> None:
    """Make all calls at the same time, and leave those alone that have not returned after `patience_s`."""

    def run(call: Callable[[], None]) -> None:
        with suppress(Exception):
            call()

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _last_words() -> str:
    if _stop.words is not None:
        return _stop.words
    where = ProgressBars.reached
    words = f"stopped {where}; the same command goes on from there" if where else "stopped; the same command goes on"
    return f"{words}: {_stop.command}" if _stop.command else words


def _say_and_flush(words: str) -> None:
    if words:
        console.show_cursor(True)
        console.print(words, markup=False, soft_wrap=True)
    sys.stdout.flush()
    sys.stderr.flush()


def _children(parents: Sequence[int]) -> list[int]:
    wanted = set(parents)
    everything = [int(name) for name in os.listdir(_PROCESSES) if name.isdigit()] if KILLS_BENEATH else []
    return [pid for pid in everything if (found := _parent_and_state(pid)) and found[0] in wanted]


def _parent_and_state(pid: int) -> tuple[int, str] | None:
    try:
        text = (_PROCESSES / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses, which may hold any character.
    state, parent, *_ = text.rpartition(")")[2].split()
    return int(parent), state


def _lives(pid: int) -> bool:
    found = _parent_and_state(pid)
    return found is not None and found[1] not in "ZX"


def _send(pid: int, signum: int) -> bool:
    try:
        os.kill(pid, signum)
    except OSError:
        return False
    return True
