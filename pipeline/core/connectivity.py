"""Whether a network service answers, within a second: small probes that send nothing but a connection or a GET."""

from __future__ import annotations

import configparser
import http.client
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

TIMEOUT_S = 1.0

_PYPI = "https://pypi.org/simple"

Result = TypeVar("Result")


def host_and_port(address: str, default_port: int) -> tuple[str, int] | None:
    """The host and port in `host:port` or `scheme://host:port/...`; None where there is no host or no such port."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        return (parts.hostname, parts.port or default_port) if parts.hostname else None
    except ValueError:
        return None


def connects(host: str, port: int, timeout_s: float = TIMEOUT_S) -> str | None:
    """None where a TCP connection opens, else why not."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return str(error)
    return None


def answers(url: str, timeout_s: float = TIMEOUT_S) -> tuple[int | None, str]:
    """(HTTP status, reason) of a GET; status None where nothing answered. Proxy variables apply."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return response.status, response.reason
    except urllib.error.HTTPError as error:
        return error.code, error.reason
    except (OSError, ValueError, http.client.HTTPException) as error:
        return None, str(getattr(error, "reason", error))


def package_index() -> str:
    """The index that pip downloads from: PIP_INDEX_URL, pip's configuration files, else PyPI."""
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


def without_login(url: str) -> str:
    """A URL fit for display: scheme, host, port and path, no user or password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(a malformed URL)"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def side_by_side(checks: Sequence[Callable[[], Result]], deadline_s: float) -> list[Result | None]:
    """Run slow checks at the same time; None for one that is not done by the deadline.

    Name resolution knows no time-out, hence daemon threads: one that hangs must not keep the process alive.
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
