"""What is refused before anything is made: the same for a run, a dry run and a job."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kasa.errors import KasaError
from pipeline.apps.dry_run import plan_run
from pipeline.cli.main import app
from pipeline.config.recipe import load_recipe
from pipeline.core.machine import Finding
from pipeline.data.first_rows import LOOKED_AT
from pipeline.run import preflight
from pipeline.run.preflight import Preflight, check_before_work
from tests.support.tiny_inputs import write_tiny_inputs

ROWS = 20


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with rows and a base as far as its files' names go."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (base / name).write_bytes(b"{}")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    write_rows(tmp_path / "rows.jsonl", ({"prompt": f"a {n}", "completion": "b"} for n in range(ROWS)))
    (tmp_path / "recipe.yaml").write_text(
        "name: tiny\nbase: {model: ./base}\ndata: {train: rows.jsonl}\n"
        "train: {workers: 2, deepspeed: cpu_zero2, precision: fp32}\nevaluate: {kind: text}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KASA_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Answers every GET with 404, as a server does that is something else."""
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def look(*overrides: str, elsewhere: bool = False) -> Preflight:
    return check_before_work(load_recipe(Path("recipe.yaml"), list(overrides)), elsewhere=elsewhere)


def test_a_sound_recipe_passes_and_nothing_is_made(tiny: Path) -> None:
    before = sorted(tiny.rglob("*"))
    assert look() == Preflight([], [])
    assert sorted(tiny.rglob("*")) == before


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights, neither"),
        ("tokenizer.json", r"has no tokenizer \(tokenizer.json,"),
    ],
)
def test_a_base_that_lacks_a_part(tiny: Path, removed: str, message: str) -> None:
    (tiny / "base" / removed).unlink()
    for elsewhere in (False, True):
        with pytest.raises(KasaError, match=message):
            look(elsewhere=elsewhere)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.model=owner/na me", "can be no hub id"),
        ("base.model=owner/name.git", "can be no hub id"),
        ("base.model=owner/-name", "can be no hub id"),
        ("base.model=https://host/owner/name", "neither a folder nor a hub id"),
        ("data.train=https:///rows.jsonl", "names no host"),
        ("data.train=https://host:port/rows.jsonl", "names no host"),
        ("data.train=http://[host/rows.jsonl", "names no host"),
        ("data.train=https://host/", "names no file"),
        ("data.heldout=hub:owner/name/a/b/c", "must have the form hub:"),
        ("data.train=row.jsonl", "did you mean rows.jsonl"),
        ("train.deepspeed=cpu_zero9", "is no name in deepspeed_configs"),
        ("adapter.method=lora", "kasa compare"),
    ],
)
def test_names_that_cannot_be(override: str, message: str) -> None:
    for elsewhere in (False, True):
        with pytest.raises(KasaError, match=message):
            look(override, elsewhere=elsewhere)


def refused(*overrides: str) -> str:
    return "\n".join(map(str, look(*overrides).refused))


def test_what_this_machine_lacks_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(preflight, "gpu_names", lambda: [])
    monkeypatch.setattr(preflight, "version", lambda package: "2.13.0+cu130")
    said = refused(
        "evaluate.metrics=[meteor]", "evaluate.harness.tasks=[arc_easy]", "train.gpu=true", "train.deepspeed=gpu_zero2"
    )
    for part in ("Java", "lm-evaluation-harness", "needs 2 GPUs at once, the cluster has 0"):
        assert part in said
    assert "needs 5000 CPU cores" in refused("train.workers=5000", "train.batch_size=5000")
    with pytest.raises(KasaError, match="Java"):
        look("evaluate.metrics=[meteor]").require()
    job = look("evaluate.metrics=[meteor]", "train.gpu=true", "train.deepspeed=gpu_zero2", elsewhere=True)
    assert not job.refused
    assert any("Java" in line for line in job.not_checked)


def test_services_that_do_not_answer(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_CONNECTION_S", 1.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        for variable, value, message in (
            ("RAY_ADDRESS", nobody, f"RAY_ADDRESS={nobody}: "),
            ("RAY_ADDRESS", f"ray://{nobody}", f"RAY_ADDRESS=ray://{nobody}: "),
            ("RAY_ADDRESS", server, "something answers there that is no Ray"),
            ("RAY_ADDRESS", f"http://{server}", "is no address of a Ray head"),
            ("MLFLOW_TRACKING_URI", f"http://alice:PW@{nobody}", f"MLFLOW_TRACKING_URI=http://{nobody} /health: "),
            ("MLFLOW_TRACKING_URI", "./mlruns", "is a file store"),
        ):
            with monkeypatch.context() as patch:
                patch.setenv(variable, value)
                said = refused()
                assert message in said, value
                assert "PW" not in said


def test_a_service_that_takes_its_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_SERVICES_S", 0.2)
    monkeypatch.setattr(preflight, "check_address", lambda address, timeout_s: threading.Event().wait(60))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert "RAY_ADDRESS=head:6379: no answer within" in refused()


def test_the_storage_of_the_workspace_is_asked(tiny: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = "workspace=s3://bucket/kasa"
    assert refused(remote).startswith(
        "the workspace s3://bucket/kasa cannot hold MLflow's database; start an MLflow server"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server}")
    monkeypatch.setattr("pipeline.tracking.server.check_store", lambda uri, timeout_s: Finding("MLflow", "ok", uri))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tiny / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    said = refused(remote)
    assert said.startswith("the workspace s3://bucket/kasa cannot be used: ")
    assert said.endswith("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    # Whatever answers there, it is no bucket that can be listed.
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    said = refused(remote)
    assert said.startswith("the workspace s3://bucket/kasa cannot be used: ")
    assert "\n" not in said
    assert not look(remote, elsewhere=True).refused
    monkeypatch.setattr(preflight, "_SERVICES_S", 0.2)
    monkeypatch.setattr(preflight, "check_location", lambda location: threading.Event().wait(60))
    assert refused(remote) == "workspace=s3://bucket/kasa: no answer within 0 s; correct it, or unset it"


def test_what_is_not_here_yet_is_listed() -> None:
    found = look("data.train=https://me:PW@host/rows.jsonl", "base.model=embedded:smollm2-135m-instruct")
    assert not found.refused
    assert found.not_checked == [
        "data.train https://host/rows.jsonl: it is fetched when the run begins",
        "base.model embedded:smollm2-135m-instruct: it is fetched when the run begins",
    ]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_the_first_rows_show(tiny: Path, elsewhere: bool) -> None:
    (tiny / "rows.jsonl").write_text('{"q": "a", "r": "b"}\n')
    with pytest.raises(KasaError, match=r"rows\.jsonl:1: columns q, r"):
        look(elsewhere=elsewhere)


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "a"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "overrides", "says"),
    [
        ({"prompt": "a {n}", "completion": ["b"]}, [], r"20 of 20 rows .*completion is not text but list"),
        ({"prompt": "a {n}", "completion": 4}, [], r"20 of 20 rows .*completion is not text but int"),
        (chat("user", "assistant", "user"), [], "does not end with an assistant turn"),
        ({"messages": []}, [], "does not end with an assistant turn"),
        (chat("usr", "assistant"), [], r"role 'usr' is none of system, developer, user"),
        (chat("user", "assistant"), [], r"1 distinct prompt, too few to hold one out"),
        ({"prompt": "a", "completion": "{n}"}, [], r"1 distinct prompt, too few to hold one out"),
        ({"prompt": "a {n}", "completion": "b"}, ["data.heldout_rows=20"], r"heldout_rows 20 is not less than the 20 samples"),
        ({"prompt": "a {n}", "completion": "b"}, ["data.validation_rows=20"], r"validation_rows 20 leaves nothing to train on"),
        ({"prompt": "a {n}", "completion": "b"}, ["data.heldout=rows.jsonl"], r"are both the same source\?"),
        ({"prompt": "a {n}", "completion": "b"}, ["data.heldout=same.jsonl"], r"are both the same source\?"),
        ({"prompt": "a {n}", "completion": "b"}, ["data.system_prompt=Be brief"], "needs a chat template"),
        ({"prompt": "a {n}", "completion": "b"}, ["data.chat_template=true"], "the tokenizer has no chat template"),
        ({"messages": [*chat("user")["messages"], {"role": "assistant", "content": "{n}"}]}, ["data.heldout_share=0.5"], "1 distinct prompt"),
        ({"messages": [{"role": "user", "content": "{n}"}, *chat("assistant")["messages"]]}, [], "needs a chat template"),
        ({"prompt": "a {n}", "completion": "b"}, ["evaluate.kind=choice"], "choice needs choices"),
        ({"prompt": "a {n}", "completion": "b"}, ["evaluate={kind: choice, choices: [c, d]}"], r"the answer 'b' of .* is none of c, d"),
        ({"text": "a {n}"}, [], r"evaluate\.kind: text needs prompts with answers"),
        ({"text": "a {n}", "label": "good"}, ["base.head=regression", "evaluate={}"], r"label is not a number but 'good'"),
        ({"text": "a {n}", "label": "good"}, ["base.head=classification", "evaluate={}"], r"have the label good, so there is nothing to tell apart"),
        ({"text": "a {n}", "label": "{n}"}, ["base.head=classification", "evaluate={}"], r"20 different labels.* those are no classes"),
        ({"text": "a {n}", "label": "good"}, ["base.head=classification", "evaluate={}", "data.labels=[fine, bad]"], r"label 'good' is none of data\.labels"),
    ],
)  # fmt: skip
def test_what_all_rows_show_where_they_are_few(
    tiny: Path, row: dict[str, Any], overrides: list[str], says: str
) -> None:
    text = json.dumps(row)
    write_rows(tiny / "rows.jsonl", (json.loads(text.replace("{n}", str(n))) for n in range(ROWS)))
    (tiny / "same.jsonl").write_bytes((tiny / "rows.jsonl").read_bytes())
    with pytest.raises(KasaError, match=says):
        look(*overrides)


def test_a_score_of_two_classes_where_there_are_three(tiny: Path) -> None:
    write_rows(tiny / "rows.jsonl", ({"text": f"a {n}", "label": n % 3} for n in range(ROWS)))
    with pytest.raises(KasaError, match=r"f1 is the score of one of two classes, and the data has 3"):
        look("base.head=classification", "evaluate={metric: f1}")


@pytest.mark.parametrize("good", [0, 1])
def test_of_many_rows_only_the_first_are_read(tiny: Path, good: int) -> None:
    """Whether too many are unusable is not known then, unless none of them can be used."""
    first = [{"prompt": "a", "completion": "b" if n < good else ""} for n in range(2 * LOOKED_AT)]
    write_rows(tiny / "rows.jsonl", first)
    if good:
        assert not look("data.heldout_rows=50000").refused
        return
    with pytest.raises(KasaError, match=rf"{LOOKED_AT} of {LOOKED_AT} rows \(100\.0%\) are unusable"):
        look()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_is_found_where_transformers_finds_it(tiny: Path, name: str) -> None:
    (tiny / "base" / name).write_text(json.dumps({"chat_template": "{{ messages }}", "eos_token": {"content": "</s>"}}))
    write_rows(tiny / "rows.jsonl", ({**chat("user", "assistant"), "system": str(n)} for n in range(ROWS)))
    assert not look("data.chat_template=true").refused


def test_an_answer_may_spell_out_its_end(tiny: Path) -> None:
    """As preparation takes it off."""
    (tiny / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    write_rows(tiny / "rows.jsonl", ({"prompt": f"a {n}", "completion": "b </s>"} for n in range(ROWS)))
    assert not look("evaluate={kind: choice, choices: [b, c]}").refused


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.max_tokens=129", r"data\.max_tokens 129 is more than the 128 tokens the base model takes"),
        ("evaluate.max_new_tokens=128", r"evaluate\.max_new_tokens 128 leaves no room for a prompt in the 128 tokens"),
    ],
)
def test_more_tokens_than_the_base_takes(tiny: Path, override: str, says: str) -> None:
    write_tiny_inputs(tiny / "whole")
    recipe = load_recipe(Path("recipe.yaml"), ["base.model=whole/base", "data.max_tokens=128", override])
    with pytest.raises(KasaError, match=says):
        plan_run(recipe)
    gpt2 = load_recipe(Path("recipe.yaml"), ["base.model=openai-community/gpt2", "data.max_tokens=1025"])
    with pytest.raises(KasaError, match=r"data\.max_tokens 1025 is more than the 1024 tokens"):
        plan_run(gpt2)


def test_a_workspace_that_is_a_file(tiny: Path) -> None:
    with pytest.raises(KasaError, match=r"the workspace \S*rows\.jsonl is a file"):
        look("workspace=rows.jsonl")


def test_a_dry_run_shows_the_plan_and_then_refuses(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    write_tiny_inputs(tiny / "whole")
    done: Any = CliRunner().invoke(
        app,
        [
            "run",
            "recipe.yaml",
            "base.model=whole/base",
            "data.max_tokens=64",
            "evaluate.metrics=[meteor]",
            "--dry-run",
            "--json",
        ],
    )
    assert isinstance(done.exception, KasaError)
    plan = json.loads(done.stdout.splitlines()[-1])
    assert "Java" in plan["refused"][0]
    assert plan["estimate"]["memory"] is not None
