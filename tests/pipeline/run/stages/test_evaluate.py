"""Results that an interrupted evaluation left: what is damaged of them is evaluated again."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.core.errors import WorkspaceError
from pipeline.core.files import append_journal
from pipeline.run.stages import evaluate
from pipeline.run.stages.evaluate import Candidate, _is_whole, _measure


def test_a_result_that_is_lost_is_no_result_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "shard-0-of-1.jsonl"
    append_journal(journal, [{"sample": number, "accuracy": 1.0} for number in range(3)])
    journal.write_bytes(journal.read_bytes().replace(b'"sample": 1', b'"sample": 7'))
    monkeypatch.setattr(evaluate, "_score", lambda *arguments: [journal])
    monkeypatch.setattr(evaluate, "_run_harness", lambda *arguments: None)
    monkeypatch.setattr(evaluate, "load_prepared", lambda folder: SimpleNamespace(summary={"heldout_rows": 3}))
    prepared = SimpleNamespace(folder=tmp_path)
    with pytest.raises(WorkspaceError, match="whole records of 2 of 3 samples; run the same command again"):
        _measure(None, prepared, Candidate("base", None, None), ["accuracy"], tmp_path)  # type: ignore[arg-type]
    assert journal.exists()


@pytest.mark.parametrize(
    ("text", "is_whole"), [("[]", True), ('[{"name": "t"}]', True), ("[", False), ("{}", False), ("", False)]
)
def test_tasks_of_the_harness_with_damaged_results_are_run_again(tmp_path: Path, text: str, is_whole: bool) -> None:
    assert not _is_whole(tmp_path / "0.json")
    (tmp_path / "0.json").write_text(text)
    assert _is_whole(tmp_path / "0.json") == is_whole
