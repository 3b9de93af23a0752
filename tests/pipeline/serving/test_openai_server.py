"""`kasa serve`: OpenAI's interface gives the answers of `kasa generate`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from kasa import save_adapter
from pipeline.core.errors import ModelError
from pipeline.models.base import BaseModel
from pipeline.models.prompting import Head, Prompting
from pipeline.serving import answer as serving_answer
from pipeline.serving import export as serving_export
from pipeline.serving import openai_server
from pipeline.serving.answer import answer
from pipeline.serving.openai_server import serving
from tests.support.interchange import random_adapter
from tests.support.tiny_inputs import write_tiny_inputs
from tests.support.tracking_server import free_port

PROMPTS = [f"count {number} from {number * 7}" for number in range(4)]
LIMIT = 8


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (serving_answer, serving_export):  # in bf16, where the processor has it, there are ties
        monkeypatch.setattr(module, "fast_precision", lambda gpu: "fp32")
    write_tiny_inputs(tmp_path)
    folder = tmp_path / "my adapter"
    save_adapter(folder, random_adapter(BaseModel("", tmp_path / "base"), "weight"))
    Prompting("Q: {prompt}\nA: ").save(folder)
    return folder


@pytest.mark.processes
def test_requests_get_the_answers_of_kasa_generate(tmp_path: Path, adapter: Path) -> None:
    typed = answer(str(adapter), PROMPTS, tmp_path / "work", tmp_path / "base", LIMIT)
    port = free_port()
    with serving(str(adapter), tmp_path / "work", tmp_path / "base", "127.0.0.1", port) as endpoint:
        assert (endpoint.name, endpoint.address) == ("my-adapter", f"http://127.0.0.1:{port}")
        assert endpoint.request is not None
        assert f"{port}/v1/chat" in endpoint.request
        assert "my-adapter" in endpoint.request
        client = OpenAI(base_url=f"{endpoint.address}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["my-adapter"]
        chats: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        asked: dict[str, Any] = {"model": endpoint.name, "max_tokens": LIMIT}
        whole = [client.chat.completions.create(messages=chat, **asked).choices[0].message.content for chat in chats]
        assert [text.strip() for text in whole] == typed
        pieces = [
            piece.choices[0].delta.content or ""
            for piece in client.chat.completions.create(messages=chats[0], stream=True, **asked)
            if piece.choices
        ]
        assert "".join(pieces).strip() == typed[0]
        completed = client.completions.create(prompt=f"Q: {PROMPTS[0]}\nA:", **asked)
        assert completed.choices[0].text.strip() == typed[0]
    assert endpoint.process.poll() is not None


def test_a_taken_port_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(
                ModelError, match=rf"127\.0\.0\.1:{port} cannot be listened at .* choose another with --port"
            ),
            serving("models:/none/1", tmp_path, None, "127.0.0.1", port),
        ):
            pass


def test_a_trained_head_is_served_elsewhere(tmp_path: Path, adapter: Path) -> None:
    Head("classification", ("bad", "good")).save(adapter)
    with (
        pytest.raises(ModelError, match=r"labels texts and generates none; `mlflow models serve`"),
        serving(str(adapter), tmp_path, tmp_path / "base", "127.0.0.1", free_port()),
    ):
        pass


@pytest.mark.processes
def test_a_server_that_ends_is_named_with_its_last_words(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An empty cache, and so no model of this name.
    monkeypatch.setattr(openai_server, "_write_cache", lambda *_: None)
    with (
        pytest.raises(ModelError, match=r"the server ended with 1: .*couldn't find them in the cached files"),
        serving(str(adapter), tmp_path, tmp_path / "base", "127.0.0.1", free_port()),
    ):
        pass


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models:/restaurants@champion", "restaurants"),
        ("models:/a b--c/3", "a-b-c"),
        ("/tmp/exports/merged/", "merged"),
        ("models:/é../1", "é"),
    ],
)
def test_names_are_those_of_repositories(model: str, name: str) -> None:
    assert openai_server._served_name(model) == name
