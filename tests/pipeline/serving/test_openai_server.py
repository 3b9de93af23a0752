"""`kasa serve`: OpenAI's interface gives the answers of `kasa generate`."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
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
from pipeline.serving.export import Format, export
from pipeline.serving.openai_server import serving
from tests.support.interchange import random_adapter
from tests.support.processes import beneath, start_kasa, wait_for
from tests.support.tiny_inputs import write_tiny_inputs
from tests.support.tracking_server import free_port

PROMPTS = [f"count {number} from {number * 7}" for number in range(4)]
LIMIT = 8
PATIENCE_S = 300.0


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (
        serving_answer,
        serving_export,
        openai_server,
    ):  # in bf16, where the processor has it, there are ties
        monkeypatch.setattr(module, "fast_precision", lambda gpu: "fp32")
    write_tiny_inputs(tmp_path)
    folder = tmp_path / "my adapter"
    save_adapter(folder, random_adapter(BaseModel("", tmp_path / "base"), "weight"))
    Prompting("Q: {prompt}\nA: ").save(folder)
    return folder


def client_of(endpoint: openai_server.Endpoint) -> OpenAI:
    return OpenAI(base_url=f"{endpoint.address}/v1", api_key="none", max_retries=0)


def chat_answers(endpoint: openai_server.Endpoint, prompts: Sequence[str]) -> list[str]:
    asked = [
        client_of(endpoint).chat.completions.create(
            model=endpoint.name, messages=[{"role": "user", "content": prompt}], max_tokens=LIMIT
        )
        for prompt in prompts
    ]
    return [(one.choices[0].message.content or "").strip() for one in asked]


@pytest.mark.processes
def test_requests_get_the_answers_of_kasa_generate(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder of the model's name, which is not the model.
    (tmp_path / "my-adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    typed = answer(str(adapter), PROMPTS, tmp_path / "work", tmp_path / "base", LIMIT)
    port = free_port()
    with serving(str(adapter), tmp_path / "work", tmp_path / "base", "127.0.0.1", port) as endpoint:
        assert (endpoint.name, endpoint.address) == ("my-adapter", f"http://127.0.0.1:{port}")
        assert endpoint.request is not None
        assert f"{port}/v1/chat" in endpoint.request
        assert "my-adapter" in endpoint.request
        client = client_of(endpoint)
        assert [model.id for model in client.models.list()] == ["my-adapter"]
        assert chat_answers(endpoint, PROMPTS) == typed
        chat: list[Any] = [{"role": "user", "content": PROMPTS[0]}]
        asked: dict[str, Any] = {"model": endpoint.name, "max_tokens": LIMIT}
        pieces = [
            piece.choices[0].delta.content or ""
            for piece in client.chat.completions.create(messages=chat, stream=True, **asked)
            if piece.choices
        ]
        assert "".join(pieces).strip() == typed[0]
        completed = client.completions.create(prompt=f"Q: {PROMPTS[0]}\nA:", **asked)
        assert completed.choices[0].text.strip() == typed[0]
        endpoint.process.kill()
        with pytest.raises(ModelError, match=r"^the server ended with -9: .*/v1/completions"):
            endpoint.wait()
    assert all(typed)


@pytest.mark.processes
@pytest.mark.parametrize("form", ["lora", "merged"])
def test_exported_folders_are_served_alike(tmp_path: Path, adapter: Path, form: Format) -> None:
    work, base, out = tmp_path / "work", tmp_path / "base", tmp_path / form
    export(str(adapter), out, form, work, base, False, "stored")
    own = None if form == "merged" else base
    typed = answer(str(out), PROMPTS, work, own, LIMIT)
    with serving(str(out), work, own, "127.0.0.1", free_port()) as endpoint:
        assert endpoint.name == form
        assert endpoint.request is not None
        assert chat_answers(endpoint, PROMPTS) == typed
    assert endpoint.process.poll() is not None
    assert typed == answer(str(adapter), PROMPTS, work, base, LIMIT)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("signum", "answers"), [(signal.SIGINT, True), (signal.SIGTERM, False)], ids=["answering", "loading"]
)
def test_a_signal_ends_the_server_and_removes_the_merged_model(
    tmp_path: Path, adapter: Path, signum: signal.Signals, answers: bool
) -> None:
    arguments = ["serve", str(adapter), "--base", str(tmp_path / "base"), "--port", str(free_port())]
    # There is no proxy at this address, and none is to be asked.
    command = start_kasa(arguments, tmp_path, {"http_proxy": "http://127.0.0.1:9"})
    [server] = wait_for(lambda: beneath(command, "transformers.cli"), command, PATIENCE_S)
    scratch = Path(server.cwd()).parent
    assert (scratch / "merged" / "model.safetensors").is_file()
    if answers:
        assert command.stdout is not None
        assert command.stdout.readline() == f"my-adapter answers at http://127.0.0.1:{arguments[-1]}/v1\n"
    command.send_signal(signum)
    said = command.communicate(timeout=PATIENCE_S)[1]
    assert command.returncode == 128 + signum
    assert "Traceback" not in said
    assert not scratch.exists()
    assert not psutil.pid_exists(server.pid)


@pytest.mark.processes
def test_a_taken_port_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = start_kasa(["serve", "models:/none/1", "--port", str(port)], tmp_path)
        said = command.communicate(timeout=PATIENCE_S)[1]
    assert command.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened at" in said
    assert "choose another --port or --host" in said


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
        pytest.raises(
            ModelError, match=r"^the server ended with 1: OSError: .*couldn't find them in the cached files\."
        ),
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
