"""Which files a job takes along."""

import errno
import os
import zipfile
from pathlib import Path

import pytest

from pipeline.apps import job_package as package
from pipeline.apps.job_package import CODE, Package, make_package, write_package
from pipeline.core.errors import JobError


def write(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def own(found: Package) -> set[str]:
    """The files that are not the pipeline's code."""
    return {name for name in found.files if name.split("/")[0] not in CODE}


def test_rubbish_stays_behind(tmp_path: Path) -> None:
    write(tmp_path, "recipe.yaml", "data/rows.jsonl", ".env.example")
    write(tmp_path, ".git/HEAD", ".venv/bin/python", "src/__pycache__/a.pyc", ".mypy_cache/x", "kasa.egg-info/PKG-INFO")
    write(tmp_path, "env311/pyvenv.cfg", "env311/lib/x.py", "runs/mlflow.db", "runs/artifacts/x", "elsewhere/big")
    assert own(make_package(tmp_path, [], tmp_path / "elsewhere")) == {"recipe.yaml", "data/rows.jsonl", ".env.example"}


def test_gitignore_counts_as_git_has_it(tmp_path: Path) -> None:
    write(tmp_path, ".gitignore", text="*.log\nbuild/\n/top.txt\n!kept.log\n")
    write(tmp_path, "sub/.gitignore", text="!wanted.log\nlocal\n")
    write(tmp_path, ".rayignore", text="*.mp4\n")
    write(tmp_path, "a.log", "kept.log", "build/x", "top.txt", "a.mp4", "sub/top.txt", "sub/wanted.log", "sub/b.log")
    write(tmp_path, "sub/local", "sub/deep/local", "sub/build/x", "local")
    assert own(make_package(tmp_path, [], tmp_path / "workspace")) == {
        ".gitignore", ".rayignore", "kept.log", "local", "sub/.gitignore", "sub/top.txt", "sub/wanted.log",
    }  # fmt: skip


def test_what_the_recipe_names_is_taken_along_though_it_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, ".gitignore", text="data/\nbase/\n")
    write(tmp_path, "data/rows.jsonl", "data/more.jsonl", "base/config.json", "base/deep/model.safetensors")
    found = make_package(tmp_path, [tmp_path / "data/rows.jsonl", tmp_path / "base"], tmp_path / "workspace")
    assert own(found) == {".gitignore", "data/rows.jsonl", "base/config.json", "base/deep/model.safetensors"}


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "outside", "rows.jsonl")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/data").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/back").symlink_to(tmp_path / "outside")
    (tmp_path / "work/self").symlink_to(tmp_path / "work")
    (tmp_path / "work/broken").symlink_to(tmp_path / "nowhere")
    assert own(make_package(tmp_path / "work", [], tmp_path / "workspace")) == {"data/rows.jsonl"}


def test_the_code_comes_along_and_is_not_shadowed(tmp_path: Path) -> None:
    found = make_package(tmp_path, [], tmp_path / "workspace")
    assert {
        "ray_jobs/run_pipeline.py",
        "pipeline/cli/main.py",
        "kasa/layer.py",
        "deepspeed_configs/cpu_zero2.json",
    } <= set(found.files)
    write(tmp_path, "pipeline/notes.txt")
    assert "pipeline/notes.txt" in make_package(tmp_path, [], tmp_path / "workspace").files
    write(tmp_path, "pipeline/cli/main.py")
    with pytest.raises(JobError, match=r"stands where a job needs the pipeline's own pipeline/cli/main\.py"):
        make_package(tmp_path, [], tmp_path / "workspace")


@pytest.mark.parametrize(
    ("file", "refused"),
    [
        ("datasets.py", True),
        ("random.py", True),
        ("pipeline.py", False),
        ("rows.py", False),
        ("sub/datasets.py", False),
    ],
)
def test_no_file_hides_a_library(file: str, refused: bool, tmp_path: Path) -> None:
    write(tmp_path, file)
    if not refused:
        assert file in make_package(tmp_path, [], tmp_path / "workspace").files
        return
    with pytest.raises(JobError, match=f"would import .*{file} in place of the library {file[:-3]}; rename it"):
        make_package(tmp_path, [], tmp_path / "workspace")
    write(tmp_path, ".gitignore", text=f"/{file}\n")
    assert file not in make_package(tmp_path, [], tmp_path / "workspace").files


def test_a_package_that_is_too_large_names_the_largest_files(tmp_path: Path) -> None:
    write(tmp_path, "recipe.yaml")
    for index, mib in enumerate((300, 10, 250)):
        (tmp_path / f"part{index}.bin").touch()
        os.truncate(tmp_path / f"part{index}.bin", mib * 2**20)
    with pytest.raises(
        JobError, match=r"Ray takes at most 511; the largest are part0.bin \(300.0 MiB\), part2.bin \(250"
    ):
        make_package(tmp_path, [], tmp_path / "workspace")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "secret")

    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    # The tests may run as root, who can read everything.
    monkeypatch.setattr(package, "file_digest", refuse)
    with pytest.raises(JobError, match="would go along with the job and cannot be read: Permission denied"):
        make_package(tmp_path, [], tmp_path / "workspace")


def test_a_workspace_that_is_just_being_made_stays_behind_and_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    write(tmp_path, "recipe.yaml", "work/.mlflow.db.lock", "work/.mlflow.db.7.partial-journal")
    found = make_package(tmp_path, [], tmp_path / "workspace")
    assert own(found) == {"recipe.yaml"}
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(JobError, match=r"recipe\.yaml would go along with the job and cannot be read: No such file"):
        write_package(found, tmp_path / "package.zip")


def test_the_size_counts_what_many_small_files_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(50):
        write(tmp_path, f"file-{index}", text="")
    found = make_package(tmp_path, [], tmp_path / "workspace")
    archive = tmp_path.parent / "package.zip"
    write_package(found, archive)
    monkeypatch.setattr(package, "PACKAGE_LIMIT_BYTES", archive.stat().st_size - 1)
    with pytest.raises(JobError):
        make_package(tmp_path, [], tmp_path / "workspace")


def test_digest_and_archive_are_those_of_names_contents_and_rights(tmp_path: Path) -> None:
    write(tmp_path / "a", "one", "two")
    write(tmp_path / "b", "two", "one")
    packages = [make_package(tmp_path / name, [], tmp_path / "workspace") for name in "ab"]
    for name, one in zip("ab", packages, strict=True):
        write_package(one, tmp_path / f"{name}.zip")
    assert packages[0].digest == packages[1].digest
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert set(archive.namelist()) == set(packages[0].files)
        assert archive.read("one") == b"x"
    (tmp_path / "b/one").chmod(0o755)
    assert make_package(tmp_path / "b", [], tmp_path / "workspace").digest != packages[0].digest
