"""The registered model behind MLflow's interface, in this process: what it takes, what it honours, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import invocations
from openai import OpenAI

from kasa import save_adapter
from kasa.files import seal_folder
from pipeline.models.base import BaseModel
from pipeline.models.prompting import Message, Prompting
from pipeline.registry.store import ModelPackage, Registry
from pipeline.run.model_package import served_params
from pipeline.serving import inference, served_model
from pipeline.serving.answer import answer
from pipeline.serving.openai_server import serving
from pipeline.tracking.runs import Tracking
from tests.support.interchange import random_adapter
from tests.support.tiny_inputs import write_tiny_inputs
from tests.support.tracking_server import free_port

PROMPTS = ["count 1 from 5", "from done", "count 3 from 7 "]
TURNS = [Message("user", "count 1"), Message("assistant", "1 done"), Message("user", "count 2")]
TALK = [{"role": turn.role, "content": turn.content} for turn in TURNS]
LENGTH = 6


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with a version of `tiny`, and its adapter beside it."""
    folder = tmp_path_factory.mktemp("registered")
    write_tiny_inputs(folder)
    save_adapter(folder / "adapter", random_adapter(BaseModel("", folder / "base"), "weight"))
    Prompting("Q: {prompt}\nA:").save(folder / "adapter")
    seal_folder(folder / "adapter")
    settings = {
        "head": "language-model",
        "base_name": "base",
        "base_folder": str(folder / "base"),
        "base_digest": BaseModel("", folder / "base").digest,
        "precision": "fp32",
        "max_new_tokens": LENGTH,
    }
    artifacts, code = {"adapter": folder / "adapter"}, Path(served_model.__file__)
    package = ModelPackage(code, (), artifacts, settings, (), PROMPTS[0], served_params(LENGTH))
    with patch.dict(os.environ):
        run = Tracking(folder / "work", "tests").start_run("register", {})
        Registry(folder / "work").register(run, "tiny", package, {"kasa.register_key": "k"})
        yield folder
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


@pytest.fixture(scope="module")
def model(workspace: Path) -> Any:
    return mlflow.pyfunc.load_model("models:/tiny/1")


@pytest.fixture(scope="module")
def typed(workspace: Path) -> list[str]:
    return answer(str(workspace / "adapter"), PROMPTS, workspace / "work", workspace / "base", LENGTH)


def test_prompts(model: Any, typed: list[str]) -> None:
    assert model.predict(PROMPTS) == typed
    assert model.predict(pd.DataFrame({"prompt": PROMPTS})) == typed
    assert model.predict([]) == []


def test_messages(model: Any, typed: list[str]) -> None:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert model.predict(chats) == typed
    assert model.predict([{"messages": chat} for chat in chats]) == typed
    assert model.predict([PROMPTS[0], chats[1], {"messages": chats[2]}]) == typed
    parts = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in PROMPTS]
    assert model.predict(parts) == typed
    loaded = model.unwrap_python_model().served
    ids = loaded.prompting.conversation_ids(loaded.tokenizer, TURNS)
    assert model.predict([TALK]) == loaded.generate([ids], LENGTH)


def test_its_signature_names_the_parameters(model: Any) -> None:
    params = {
        param["name"]: (param["type"], param["default"]) for param in model.metadata.get_params_schema().to_dict()
    }
    assert params == {
        "max_new_tokens": ("long", LENGTH),
        "temperature": ("double", 0.0),
        "top_p": ("double", 1.0),
        "stop": ("string", [""]),
    }


def test_parameters_are_honoured(model: Any, typed: list[str]) -> None:
    loaded = model.unwrap_python_model().served
    (one,) = model.predict(PROMPTS[:1], params={"max_new_tokens": 1})
    assert one
    assert typed[0].startswith(one)
    assert len(one) < len(typed[0])
    stop = typed[0][2:4]
    (cut,) = model.predict(PROMPTS[:1], params={"stop": [stop, "never"], "max_new_tokens": 300 // 4})
    assert cut == typed[0][: typed[0].index(stop)].strip()
    torch.manual_seed(0)
    drawn = [model.predict(PROMPTS[:1], params={"temperature": 5.0})[0] for _ in range(3)]
    assert len({*drawn, typed[0]}) > 2
    # Of the nucleus of a sum near 0 there is the likeliest alone.
    assert model.predict(PROMPTS, params={"temperature": 5.0, "top_p": 1e-6}) == typed
    assert loaded.model.generation_config.do_sample is False


def test_it_stops_as_soon_as_every_answer_has_its_end(
    model: Any, typed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = model.unwrap_python_model().served
    steps: list[int] = []
    own = loaded.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", forward)
    model.predict(PROMPTS[:1], params={"stop": [typed[0][:1]], "max_new_tokens": 50})
    assert len(steps) < LENGTH


def test_many_requests_are_answered_in_batches(model: Any, typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_PROMPTS_PER_BATCH", 2)
    loaded = model.unwrap_python_model().served
    sizes: list[int] = []
    own = loaded.model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        return own(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "generate", generate)
    assert model.predict(PROMPTS) == typed
    assert sizes == [2, 1]


@pytest.mark.parametrize(
    ("request_", "params", "message"),
    [
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0; it is at least 1"),
        ("a", {"temperature": -1.0}, "temperature is -1.0; it is a number of at least 0"),
        ("a", {"top_p": 0.0}, "top_p is 0.0; it is above 0"),
        ("a", {"stop": "text"}, "Value must be a 1D array"),
        ("a", {"temperature": "warm"}, "Invalid parameters found"),
        ([], {}, "a request is neither a prompt nor a list of messages"),
        ({"prompt": "a"}, {}, "a request has prompt beside its messages"),
        ({"messages": TALK, "temperature": 1}, {}, "a request has temperature beside its messages"),
        (TALK[:2], {}, "the last message is of role assistant"),
        ([{"role": "tool", "content": "4"}], {}, "a message has the role 'tool'"),
        ([{"role": "user", "content": None}], {}, "has the content None, which is no text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "reads parts of type text alone"),
        ([{"role": "assistant", "content": "a", "tool_calls": [1]}, *TALK], {}, "a message has tool_calls"),
    ],
)
def test_what_cannot_be_answered_is_refused(model: Any, request_: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(MlflowException) as refused:
        model.predict([request_], params=params)
    assert message in str(refused.value)
    assert refused.value.error_code == "INVALID_PARAMETER_VALUE"


def test_the_scoring_server_answers_the_documented_requests(model: Any, typed: list[str]) -> None:
    import json

    def post(body: dict[str, Any]) -> Any:
        schema = model.metadata.get_input_schema()
        return json.loads(invocations(json.dumps(body), "application/json", model, schema).response)["predictions"]

    assert post({"inputs": PROMPTS}) == typed
    assert post({"inputs": []}) == []
    assert post({"inputs": [[{"role": "user", "content": PROMPTS[1]}]]}) == typed[1:2]
    short = post({"inputs": PROMPTS[:1], "params": {"max_new_tokens": 1, "stop": ["never"]}})
    assert short == model.predict(PROMPTS[:1], params={"max_new_tokens": 1})
    with pytest.raises(MlflowException):
        post({"messages": TALK})


@pytest.mark.processes
def test_openai_s_interface_has_it_under_its_registered_name(workspace: Path) -> None:
    typed = answer("models:/tiny/1", PROMPTS, workspace / "work", None, LENGTH)
    with serving("models:/tiny/1", workspace / "work", None, "127.0.0.1", free_port()) as endpoint:
        client = OpenAI(base_url=f"{endpoint.address}/v1", api_key="none", max_retries=0)
        said = [
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=LENGTH
            )
            for prompt in PROMPTS
        ]
    assert [(one.choices[0].message.content or "").strip() for one in said] == typed
