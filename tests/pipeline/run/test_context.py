"""What a run keeps for the next one, and that of two at once one waits."""

import threading

import pytest

from pipeline.run.context import alone, read_state, recipe_digest, write_state
from pipeline.storage import artifacts
from pipeline.storage.workspace import Workspace


@pytest.mark.parametrize("damage", [("abc", "abd"), ("{", "["), ('"parent"', '"parrot"'), ("\n", "\0")])
def test_a_damaged_state_is_named_and_the_run_begins_anew(recipe, tmp_path, capsys, damage) -> None:
    ours, state = recipe(), {"parent": "abc", "children": {"train": "def"}, "remade": {"train": []}}
    storage = Workspace(tmp_path)
    assert read_state(storage, ours) == {}
    write_state(storage, ours, state)
    assert read_state(storage, ours) == state
    (file,) = (tmp_path / "runs").iterdir()
    file.write_text(file.read_text().replace(*damage))
    assert read_state(storage, ours) == {}
    assert recipe_digest(ours) in capsys.readouterr().err.replace("\n", "")


def test_of_two_runs_of_a_recipe_one_waits_and_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(artifacts, "_PATIENCE_S", 0.01)
    storage, events = Workspace(tmp_path), []
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with alone(storage, "digest", "a run of this recipe"):
            events.append("second")

    with alone(storage, "digest", "a run of this recipe"), alone(storage, "another", "a run of another recipe"):
        thread = threading.Thread(target=second)
        thread.start()
        begun.wait(10)
        thread.join(0.2)
        events.append("first")
    thread.join(10)
    assert events == ["first", "second"]
    assert "a run of this recipe is at work in this workspace already" in capsys.readouterr().err
