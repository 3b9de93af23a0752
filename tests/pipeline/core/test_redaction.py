"""What is left of a text once its secrets are out, and commands with words that a shell would act on."""

from __future__ import annotations

import shlex

import pytest

from pipeline.core.redaction import redacted, redacted_values, shell_command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://alice:PW@host:5000/a", "http://host:5000/a"),
        ("http://alice:p@W/x@host:5000/a", "http://host:5000/a"),
        ("https://hf_abcdefghijklmnop@host/a@v1", "https://host/a@v1"),
        ("http://host:8080/x@y and postgresql://u:PW@db/name?sslmode=require", None),
        ("sqlite:////data/ws/mlflow.db", "sqlite:////data/ws/mlflow.db"),
        ("https://host/r.jsonl?token=PW&part=3", "https://host/r.jsonl?token=***&part=3"),
        ("https://host/r.jsonl?part=3&author=me&keyword=key", "https://host/r.jsonl?part=3&author=me&keyword=key"),
        (
            "https://b.s3.amazonaws.com/r.jsonl?X-Amz-Algorithm=A&X-Amz-Credential=PW%2Fx&X-Amz-Signature=PW",
            "https://b.s3.amazonaws.com/r.jsonl?X-Amz-Algorithm=***&X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        ("https://a.blob.net/r?sv=2024&se=2030-01-01&sig=PW%3D", "https://a.blob.net/r?sv=2024&se=***&sig=***"),
        (
            "Max retries exceeded with url: /r?api_key=PW (Caused by",
            "Max retries exceeded with url: /r?api_key=*** (Caused by",
        ),
        ("kasa submit r.yaml --env HF_TOKEN=PW --env SEED=1", "kasa submit r.yaml --env HF_TOKEN=*** --env SEED=1"),
        ("Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer ***"),
        ("the token hf_ABCDEFGHIJKLMNOPQRST was refused", "the token *** was refused"),
        ("a base model, rank 8: loss 2.1 @ step 3", "a base model, rank 8: loss 2.1 @ step 3"),
    ],
)
def test_no_secret_is_left(text: str, shown: str | None) -> None:
    assert "PW" not in redacted(text)
    assert redacted(text) == shown or shown is None
    assert redacted(redacted(text)) == redacted(text)


def test_what_the_environment_holds_as_a_secret_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/a/path/that/may/be/shown")
    assert redacted("401 for correct horse at /a/path/that/may/be/shown") == "401 for *** at /a/path/that/may/be/shown"


def test_values_keep_their_form() -> None:
    values = {"data": {"train": ["https://me:pw@h/a"], "rows": 3}, "none": None}
    assert redacted_values(values) == {"data": {"train": ["https://h/a"], "rows": 3}, "none": None}


@pytest.mark.parametrize("word", ["w s;x", "evil$(touch F)/llama", "it's", "", "a\nb", "`id`"])
def test_a_printed_command_says_what_was_meant(word: str) -> None:
    assert shlex.split(shell_command("kasa", "models", "--workspace", word)) == ["kasa", "models", "--workspace", word]
