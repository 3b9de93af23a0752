"""A judge on loopback that speaks OpenAI's chat completions: it prefers longer answers, and says so in words."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = list[dict[str, str]]


def likes_length(messages: Messages) -> str:
    """A grade by length, or the longer of two answers."""
    asked = messages[1]["content"]
    if "[Second assistant]" not in asked:
        return f"It has some length.\nGrade: {min(10, 1 + _last_answer(asked) // 4)}"
    first, second = map(_last_answer, asked.split("[Second assistant]"))
    return f"I count.\n**Verdict: {'first' if first > second else 'second' if second > first else 'tie'}**"


def likes_the_first(messages: Messages) -> str:
    """Whatever is shown first is better."""
    return "Verdict: first" if "[Second assistant]" in messages[1]["content"] else "Grade: 5"


def _last_answer(conversation: str) -> int:
    return len(re.split(r"\[Assistant\]\n", conversation)[-1].split("[A good answer")[0].strip())


@dataclass
class Answering:
    """How the server answers: `judge` finds the words, any status but 200 refuses."""

    judge: Callable[[Messages], str] = likes_length
    status: int = 200
    asked: list[Messages] = field(default_factory=list)
    address: str = ""


@contextmanager
def judge_server() -> Iterator[Answering]:
    """A server that answers as the yielded object says."""
    answering = Answering()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answering.asked.append(request["messages"])
            body: dict[str, Any] = {"error": {"message": "no such key"}}
            if answering.status == 200:
                message = {"role": "assistant", "content": answering.judge(request["messages"])}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            data = json.dumps(body).encode()
            self.send_response(answering.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answering.address = f"http://127.0.0.1:{server.server_port}/v1"
        yield answering
        server.shutdown()
