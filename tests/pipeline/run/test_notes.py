"""What stands in MLflow for an artifact that is too large for it, or that another run made."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.run.stage_runs import reference, reuse_note
from pipeline.storage.artifacts import Artifact, ArtifactStore, StageKey


def make(workspace: Path) -> Artifact:
    def fill(folder: Path) -> dict[str, int]:
        (folder / "spectra").mkdir()
        (folder / "spectra" / "tensors").write_bytes(b"12345")
        return {}

    return ArtifactStore(workspace).find_or_make(StageKey("spectra", {"rank": 4}), fill)


def test_a_reference_says_where_and_what(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    digest = hashlib.sha256((artifact.folder / "manifest.json").read_bytes()).hexdigest()
    for path in (artifact.folder / "spectra", artifact.folder):
        assert reference(path, 5, tmp_path / "artifacts") == {
            "path": str(path),
            "bytes": 5,
            "key": f"spectra/{artifact.key}",
            "manifest_sha256": digest,
        }


def test_a_reference_to_a_file_outside_the_artifacts(tmp_path: Path) -> None:
    assert reference(tmp_path / "file", 7, tmp_path / "artifacts") == {"path": str(tmp_path / "file"), "bytes": 7}


def test_a_note_of_reuse_links_the_run_where_there_is_one(tmp_path: Path) -> None:
    artifact, maker = make(tmp_path), "0123456789abcdef" * 2
    linked = reuse_note(artifact, maker, f"#/experiments/1/runs/{maker}")
    assert f"`spectra/{artifact.key}`" in linked
    assert f"[run 01234567](#/experiments/1/runs/{maker})" in linked
    assert reuse_note(artifact, maker, None).endswith(f"by run {maker}, which this store does not have.")
