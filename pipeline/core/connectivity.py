"""Whether a network service answers, within a second. A probe opens a connection or sends a GET, and nothing more."""

from __future__ import annotations

import configparser
import http.client
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_S = 1.0

_PYPI = "https://pypi.org/simple"


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


def without_login(url: str) -> str:
    """A URL that is safe to display: scheme, host, port and path, without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(a malformed URL)"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
