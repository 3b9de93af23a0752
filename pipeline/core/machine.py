"""This machine: what it offers a process, whether a network service answers it, and work beside the main thread.

Cores, memory and fast precision are read within the limits of the container. A network probe opens a connection or sends a
GET, and nothing more.
"""

from __future__ import annotations

import configparser
import http.client
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

Result = TypeVar("Result")
Status = Literal["ok", "warn", "fail"]

TIMEOUT_S = 1.0
_PYPI = "https://pypi.org/simple"
GIB = 2**30
_CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        status: `ok`, `warn`, or `fail` if a run cannot work.
        detail: what was found.
        remedy: what to do; empty where nothing is wrong.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


@contextmanager
def in_background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work(stop)` in a thread during the block. At the end of the block `stop` is set and the thread is joined.

    The thread is a daemon: should the interpreter be torn down before the block ends, it keeps nobody waiting.
    """
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def side_by_side(checks: Sequence[Callable[[], Result]], deadline_s: float) -> list[Result | None]:
    """Run slow checks at the same time; None for each that is not done by the deadline.

    Name resolution has no time-out, hence daemon threads: one that hangs must not keep the process alive.
    """
    results: list[Result | None] = [None] * len(checks)

    def store(index: int, check: Callable[[], Result]) -> None:
        results[index] = check()

    threads = [threading.Thread(target=store, args=pair, daemon=True) for pair in enumerate(checks)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return list(results)


def backoff_s(first_s: float, longest_s: float) -> Iterator[float]:
    """Seconds to wait before each new attempt, without end: doubled each time up to `longest_s`."""
    pause_s = first_s
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, longest_s)


def host_and_port(address: str, default_port: int) -> tuple[str, int] | None:
    """The host and port of `host:port` or `scheme://host:port/...`; None if the host is missing or the port is no number."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        return (parts.hostname, parts.port or default_port) if parts.hostname else None
    except ValueError:
        return None


def connects(host: str, port: int, timeout_s: float = TIMEOUT_S) -> str | None:
    """Open a TCP connection and close it again. Returns None on success, else the reason for the failure."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return str(error)
    return None


def answers(url: str, timeout_s: float = TIMEOUT_S) -> tuple[int | None, str]:
    """Send a GET request; the environment's proxy variables apply.

    Returns:
        (HTTP status, reason). The status is None if nothing answered, and the reason then says why.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return response.status, response.reason
    except urllib.error.HTTPError as error:
        return error.code, error.reason
    except (OSError, ValueError, http.client.HTTPException) as error:
        return None, str(getattr(error, "reason", error))


def package_index() -> str:
    """The URL of the index that pip downloads from: PIP_INDEX_URL, then pip's configuration files, then PyPI."""
    if os.environ.get("PIP_INDEX_URL"):
        return os.environ["PIP_INDEX_URL"]
    parser = configparser.RawConfigParser()
    home = Path.home()
    candidates = [Path("/etc/pip.conf"), home / ".pip/pip.conf", home / ".config/pip/pip.conf"]
    try:
        parser.read([*candidates, os.environ.get("PIP_CONFIG_FILE", os.devnull)], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return _PYPI
    return parser.get("global", "index-url", fallback=_PYPI)


def cpu_cores(cgroup_root: Path = _CGROUP_ROOT) -> int:
    """How many cores this process may use: its affinity, limited by the cgroup quota (rounded down, at least 1)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(cgroup_root)
    return max(1, min(affinity, math.floor(quota))) if quota else affinity


def memory_gib(cgroup_root: Path = _CGROUP_ROOT, meminfo: Path = Path("/proc/meminfo")) -> tuple[float, float] | None:
    """(total, available) memory in GiB, the smaller of machine and cgroup; None if the system does not report it."""
    values = _meminfo_bytes(meminfo)
    if values is None:
        return None
    total, available = values
    limit, used = _cgroup_memory(cgroup_root)
    if limit is not None and limit < total:
        total, available = limit, min(available, max(0, limit - (used or 0)))
    return total / GIB, available / GIB


def gpu_names() -> list[str] | None:
    """The names of the NVIDIA GPUs that this process may use; None where there may be GPUs of another make."""
    import pynvml

    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        names = [str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))) for index in range(count)]
    except pynvml.NVMLError:  # no driver
        return None if Path("/dev/kfd").exists() else []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names[: len(chosen)] if chosen != [""] else names


def fast_precision(gpu: bool, cpuinfo: Path = Path("/proc/cpuinfo")) -> Literal["bf16", "fp32"]:
    """The precision that is fast on this machine: bf16 on GPUs and on processors with bf16 instructions, else fp32.

    A processor without them takes 6 times as long in bf16 for a forward pass and 40 times for a backward pass (measured
    with AVX2 and torch 2.13).
    """
    if gpu:
        return "bf16"
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return "fp32"
    return "bf16" if words & {"avx512_bf16", "amx_bf16", "bf16"} else "fp32"


def existing_parent(path: Path) -> Path:
    """The path itself if it exists, else its nearest parent that does."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _cpu_quota(root: Path) -> float | None:
    unified = _words(root / "cpu.max")
    if len(unified) == 2 and unified[0] != "max":
        return int(unified[0]) / int(unified[1])
    quota, period = _words(root / "cpu" / "cpu.cfs_quota_us"), _words(root / "cpu" / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def _cgroup_memory(root: Path) -> tuple[int | None, int | None]:
    """(limit, usage) in bytes; cgroup v2 is read first, then v1."""
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory" / "memory.limit_in_bytes", root / "memory" / "memory.usage_in_bytes"),
    ):
        number = _number(limit)
        if number is not None:
            return number, _number(used)
    return None, None


def _meminfo_bytes(file: Path) -> tuple[int, int] | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if len(line.split()) > 1}
    if "MemTotal" not in kib:
        return None
    return kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemTotal"]) * 1024


def _number(file: Path) -> int | None:
    words = _words(file)
    return int(words[0]) if words and words[0].isdigit() else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []
