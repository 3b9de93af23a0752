"""What a workspace holds of a hub data set as that grows, found out by `test_hub.py` in a process of its own: the hub's real
client reads HF_ENDPOINT when it is imported. The hub is a server on loopback that speaks as much of its API as is asked for.

usage: HF_ENDPOINT is set here; python hub_script.py FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

NAME = "someone/rows"


@dataclass
class Hub:
    """Revisions of one data set, commit -> the bytes of `train.jsonl`, and the requests so far."""

    revisions: dict[str, bytes] = field(default_factory=dict)
    newest: str = ""
    asked: list[str] = field(default_factory=list)

    def commit(self, *texts: str) -> str:
        data = "".join(json.dumps({"prompt": text, "completion": "yes"}) + "\n" for text in texts).encode()
        self.newest = hashlib.sha1(data).hexdigest()
        self.revisions[self.newest] = data
        return self.newest


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self._answer()

        def log_message(self, *arguments: Any) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            api = f"/api/datasets/{NAME}"
            if path.startswith(api):
                rest = path.removeprefix(api).strip("/").split("/")
                revision = self._revision(rest[1] if len(rest) > 1 else "main")
                if revision is None:
                    self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                elif rest[0] in ("tree", "paths-info"):
                    self._json([self._entry(revision)])
                elif rest[0] in ("", "revision"):
                    self._json({"id": NAME, "sha": revision, "siblings": [{"rfilename": "train.jsonl"}], "tags": []})
                else:
                    self._send(404, b"{}")
            elif parts[:3] == ["datasets", *NAME.split("/")] and parts[3:4] == ["resolve"]:
                revision = self._revision(parts[4])
                if revision is None or parts[5:] != ["train.jsonl"]:
                    self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                else:
                    data = hub.revisions[revision]
                    tag = hashlib.sha256(data).hexdigest()
                    self._send(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": revision})
            else:
                self._send(404, b"{}")

        def _revision(self, name: str) -> str | None:
            name = hub.newest if name == "main" else name
            return name if name in hub.revisions else None

        def _entry(self, revision: str) -> dict[str, Any]:
            data = hub.revisions[revision]
            return {
                "type": "file",
                "path": "train.jsonl",
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
                "lastCommit": None,
            }

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def main(folder: Path) -> dict[str, Any]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    from datasets import load_dataset

    from pipeline.config.settings import DataSettings
    from pipeline.core.errors import DataError
    from pipeline.data.remote import look_for_newest
    from pipeline.data.sources import resolve_sources

    def prompts(entry: str = f"hub:{NAME}") -> list[str]:
        sources = resolve_sources(DataSettings(train=[entry]), folder / "workspace")
        assert sources is not None
        files.add(str(sources.train[0].path))
        return load_dataset("parquet", data_files=str(sources.train[0].path), split="train")["prompt"][:]

    files: set[str] = set()
    following = DataSettings(train=[f"hub:{NAME}"])
    first = hub.commit("one")
    found: dict[str, Any] = {"at first": prompts()}
    hub.commit("one", "two")
    hub.asked.clear()
    found |= {"after a commit": prompts(), "requests of a run": list(hub.asked)}
    look_for_newest(following, folder / "workspace")
    found["after a look"] = prompts()
    hub.asked.clear()
    look_for_newest(following, folder / "workspace")
    found["requests of a look at nothing new"] = list(hub.asked)
    found["the first revision, by name"] = prompts(f"hub:{NAME}@{first}:train")
    found["files"] = len(files)
    hub.commit("three")
    server.shutdown()
    server.server_close()
    look_for_newest(following, folder / "workspace")
    found["without a hub"] = prompts()
    try:
        look_for_newest(following, folder / "another workspace")
    except DataError as error:
        found["without a hub and without data"] = str(error)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
