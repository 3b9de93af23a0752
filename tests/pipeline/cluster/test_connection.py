"""What a Ray of the run's own is started with, and when there is one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pipeline.cluster import connection
from pipeline.cluster.connection import _loopback, _own_token, _short_folder, cluster_address, ray_cluster
from pipeline.core.errors import ClusterError


@pytest.mark.parametrize(
    ("value", "address"), [("", None), ("local", None), ("auto", "auto"), ("head:6379", "head:6379")]
)
def test_which_cluster_is_meant(value: str, address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster_address() == address


def test_nobody_else_can_read_the_token_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    rename = os.replace

    def watched(source: Path, target: Path) -> None:
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    token = _own_token(tmp_path)
    assert modes == [0o600]
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert _own_token(tmp_path).read_text() == token.read_text()


@pytest.mark.parametrize(("folder", "is_short"), [("/tmp", True), ("/" + "x" * 35, True), ("/" + "x" * 36, False)])
def test_sockets_have_names_that_fit(folder: str, is_short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", folder)
    assert _short_folder() == ({} if is_short else {"_temp_dir": "/tmp/ray"})


def test_process_groups_keep_to_the_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "eth0"), (2, "lo")])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert _loopback() == {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"}


def test_a_head_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_ANSWER_S", 1.0)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with ray_cluster(tmp_path, 1, 0), pytest.raises(ClusterError, match=r"RAY_ADDRESS=127\.0\.0\.1:9: .*unset it"):
        connection.ensure_connected()
