"""Hub data sets: what an entry means, and which revision is taken while the data set grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import DataError
from pipeline.data.remote import HubSplit, parse_entry
from tests.support import ROOT

SCRIPT = Path(__file__).with_name("hub_script.py")


@pytest.mark.parametrize(
    ("entry", "meaning"),
    [
        ("hub:squad", HubSplit("squad", None, "train")),
        ("hub:a/b:test", HubSplit("a/b", None, "test")),
        ("hub:a/b@refs/pr/1", HubSplit("a/b", "refs/pr/1", "train")),
        ("hub:a/b@v1.0:test", HubSplit("a/b", "v1.0", "test")),
        ("hub:nyu-mll/glue/sst2:validation", HubSplit("nyu-mll/glue", None, "validation", "sst2")),
        ("hub:a/b/c@v1:test", HubSplit("a/b", "v1", "test", "c")),
    ],
)
def test_an_entry_names_data_set_revision_and_split(entry: str, meaning: HubSplit) -> None:
    assert parse_entry(entry, "data.train") == meaning


@pytest.mark.parametrize("entry", ["hub:", "hub:a/b/c/d", "hub:a/b@", "hub:a/b:x:y", "hub:a b"])
def test_another_form_is_refused(entry: str) -> None:
    with pytest.raises(DataError, match=r"data\.train: .* must have the form"):
        parse_entry(entry, "data.train")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hub")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"said": done.stderr}


@pytest.mark.processes
def test_a_run_takes_what_it_has_and_asks_nobody(seen: dict[str, Any]) -> None:
    assert seen["at first"] == seen["after a commit"] == ["one"]
    assert seen["requests of a run"] == []


@pytest.mark.processes
def test_a_look_fetches_what_is_new_into_a_file_of_its_own(seen: dict[str, Any]) -> None:
    assert seen["after a look"] == ["one", "two"]
    assert seen["the first revision, by name"] == ["one"]
    assert seen["files"] == 2


@pytest.mark.processes
def test_a_look_at_nothing_new_is_one_request(seen: dict[str, Any]) -> None:
    assert len(seen["requests of a look at nothing new"]) == 1


@pytest.mark.processes
def test_without_a_hub_what_is_here_serves_and_that_is_said(seen: dict[str, Any]) -> None:
    assert seen["without a hub"] == ["one", "two"]
    assert "going on with revision" in seen["said"]
    assert "cannot be asked" in seen["without a hub and without data"]
