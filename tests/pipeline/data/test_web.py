"""Data files at an address: fetched once, whole or not at all."""

from __future__ import annotations

import base64
import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.core.errors import DataError
from pipeline.data import remote
from pipeline.data.remote import web_file
from pipeline.data.sources import resolve_source

ROWS = b'{"text": "one"}\n{"text": "two"}\n'


class Site(ThreadingHTTPServer):
    """Answers with `content`, of which it may send less than it announces, or with the bytes of `raw` as they are."""

    content, sent, asked = ROWS, len(ROWS), 0
    raw: Iterable[bytes] = ()
    login: str | None = None


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked += 1
        self.server.login = self.headers["Authorization"]
        if self.server.raw:
            try:
                for piece in self.server.raw:
                    self.wfile.write(piece)
            except OSError:
                pass  # the other side has had enough
            return
        found = self.path.startswith("/rows.jsonl") or self.path.endswith(".pdf")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(self.server.content) if found else 0))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.sent] if found else b"")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Site(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def address(site: Site, path: str = "rows.jsonl") -> str:
    return f"http://127.0.0.1:{site.server_port}/{path}"


def fetch(where: str, workspace: Path, allowed: bool = True) -> Path | None:
    return web_file(where, "data.train", workspace, allowed)


def test_a_file_is_fetched_once(site: Site, tmp_path: Path) -> None:
    assert fetch(address(site), tmp_path, allowed=False) is None
    assert site.asked == 0
    file = fetch(address(site), tmp_path)
    assert file is not None
    assert file.read_bytes() == ROWS
    site.content = b"other"
    assert fetch(address(site), tmp_path) == fetch(address(site), tmp_path, allowed=False) == file
    assert (file.read_bytes(), site.asked) == (ROWS, 1)


def test_what_breaks_off_is_not_taken_for_the_file(site: Site, tmp_path: Path) -> None:
    site.sent = 10
    with pytest.raises(DataError, match=rf"data\.train: .*rows\.jsonl broke off {len(ROWS) - 10} bytes before its end"):
        fetch(address(site), tmp_path)
    site.sent = len(ROWS)
    file = fetch(address(site), tmp_path)
    assert file is not None
    assert file.read_bytes() == ROWS
    assert [entry.name for entry in file.parent.iterdir() if entry.name.endswith(".partial")] == []


OK = b"HTTP/1.0 200 OK\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def _endless() -> Iterator[bytes]:
    yield OK + b"\r\n"
    yield from itertools.repeat(b"x" * 65536)


def _drops() -> Iterator[bytes]:
    yield OK + b"\r\n"
    while True:
        time.sleep(0.02)
        yield b"x"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([b"HTTP/1.0 what\r\n\r\n"], r"cannot be fetched \(HTTP/1\.0 what"),
        ([b"garbage\r\n\r\n"], r"cannot be fetched \(garbage"),
        ([b" "], r"cannot be fetched \("),
        ([OK, b"X: " + b"y" * 70_000], r"cannot be fetched \(got more than 65536 bytes"),
        ([OK, b"X: y\r\n" * 200], r"cannot be fetched \(got more than 100 headers"),
        ([CHUNKED, b"zz\r\nabc"], r"cannot be fetched \("),
        ([CHUNKED, b"5\r\nab"], r"cannot be fetched \(IncompleteRead"),
        (_endless(), "goes on after [0-9]+ bytes without having said how long it is"),
        (_drops(), "is too slow"),
        ([OK, b"Content-Length: 1000000000000000000\r\n\r\nabc"], "has 1000000000000000000 bytes, and"),
        (
            [b"HTTP/1.0 302 Found\r\nLocation: http://localhost/rows.jsonl\r\n\r\n"],
            "redirects to http://localhost, which the recipe does not name",
        ),
        ([b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:1/rows.jsonl\r\n\r\n"], "redirects to http://127.0.0.1"),
        ([b"HTTP/1.0 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"], r"cannot be fetched \("),
        ([b"HTTP/1.0 302 Found\r\nLocation: http://[::1/\r\n\r\n"], r"cannot be fetched \("),
    ],
)
def test_a_broken_or_endless_answer_is_one_line_and_leaves_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: Iterable[bytes], message: str
) -> None:
    monkeypatch.setattr(remote, "_LONGEST_UNANNOUNCED_BYTES", 1 << 20)
    monkeypatch.setattr(remote, "_SLOW_START_S", 0.2)
    site.raw = raw
    with pytest.raises(DataError, match=message) as caught:
        fetch(address(site), tmp_path)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [".rows.jsonl.lock"]


def test_a_redirect_within_the_host_is_followed(site: Site, tmp_path: Path) -> None:
    where = f"HTTP/1.0 302 Found\r\nLocation: {address(site, 'rows.jsonl?second')}\r\n\r\n"
    site.raw = _then_nothing(site, where.encode())
    file = fetch(address(site), tmp_path)
    assert file is not None
    assert (file.read_bytes(), site.asked) == (ROWS, 2)


def test_a_login_is_sent_to_the_host_and_shown_in_no_reason(site: Site, tmp_path: Path) -> None:
    where = address(site).replace("//", "//alice:s%40cret@")
    file = fetch(where, tmp_path)
    assert file is not None
    assert file.read_bytes() == ROWS
    assert site.login == "Basic " + base64.b64encode(b"alice:s@cret").decode()
    site.raw = [OK, b"Location: x", b"y" * 70_000]
    with pytest.raises(DataError) as caught:
        fetch(where + "?more", tmp_path)
    assert "cret" not in str(caught.value).replace(where, "")


def _then_nothing(site: Site, piece: bytes) -> Iterator[bytes]:
    site.raw = ()
    yield piece


def test_addresses_that_lead_nowhere(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be fetched \(Not Found\); check the address and the network"):
        fetch(address(site, "gone.jsonl"), tmp_path)
    with pytest.raises(DataError, match="names no file"):
        fetch(address(site, ""), tmp_path)
    with pytest.raises(DataError, match="names no host"):
        fetch("http://[::1/rows.jsonl", tmp_path)
    with pytest.raises(DataError, match="is of no known format"):
        resolve_source(address(site, "rows.pdf"), "data.train", tmp_path, fetch=True)
    site.shutdown()
    site.server_close()
    with pytest.raises(DataError, match=r"cannot be fetched \(.*refused"):
        fetch(address(site, "later.jsonl"), tmp_path)
