"""Data files at an address: fetched once, whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.core.errors import DataError
from pipeline.data.remote import web_file
from pipeline.data.sources import resolve_source

ROWS = b'{"text": "one"}\n{"text": "two"}\n'


class Site(ThreadingHTTPServer):
    """Answers with `content`, of which it may send less than it announces."""

    content, sent, asked = ROWS, len(ROWS), 0


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked += 1
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


def test_addresses_that_lead_nowhere(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be fetched \(Not Found\); check the address and the network"):
        fetch(address(site, "gone.jsonl"), tmp_path)
    with pytest.raises(DataError, match="names no file"):
        fetch(address(site, ""), tmp_path)
    with pytest.raises(DataError, match="is of no known format"):
        resolve_source(address(site, "rows.pdf"), "data.train", tmp_path, fetch=True)
    site.shutdown()
    site.server_close()
    with pytest.raises(DataError, match=r"cannot be fetched \(.*refused"):
        fetch(address(site, "later.jsonl"), tmp_path)
