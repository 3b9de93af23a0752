"""What is sent with a job, and the checks before anything is sent, with the errors of a run.

The package holds the files of the working directory that are not ignored, and the pipeline's own code. They are chosen here
and not by Ray, so that the digest in the job's id, the checked size and the upload cover the same files.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from pathspec import GitIgnoreSpec

import pipeline
from kasa.files import file_digest
from pipeline.config.deepspeed import config_names
from pipeline.config.recipe import Recipe
from pipeline.core.errors import JobError, WorkspaceError
from pipeline.core.files import user_path
from pipeline.data.forms import check_form
from pipeline.data.sources import HUB, resolve_source
from pipeline.models.base import find_base
from pipeline.models.embedded import PREFIX as EMBEDDED

_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")

# Ray stores a package in one message of at most 512 MiB to its head; 1 MiB is left for the message's other parts.
PACKAGE_LIMIT_BYTES = 512 * 2**20 - 2**20
# Bytes of a file in the archive beside its content and, twice, its name.
_ENTRY_BYTES = 128
_LARGEST_SHOWN = 5
CODE = ("kasa", "pipeline", "ray_jobs", "deepspeed_configs")
RUBBISH = frozenset(
    {".git", ".hg", ".svn", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".cache"}
    | {".ipynb_checkpoints", ".tox", ".nox", ".idea", ".vscode", "node_modules", "mlruns"}
)
# A folder with one of these files is a virtual environment, or a run's workspace, perhaps one that is just being made.
_MARKS = ("pyvenv.cfg", "mlflow.db", ".mlflow.db.lock")


def check_inputs(recipe: Recipe, recipe_file: Path, folder: Path) -> list[Path]:
    """The files and folders that a job must take along: those that its recipe names by relative path.

    Inputs named by absolute path, on a hub or by a URL are left to the job.

    Args:
        recipe: the resolved recipe.
        recipe_file: its file.
        folder: the working directory, which the job takes along.

    Returns:
        Absolute paths, the recipe's own file first.

    Raises:
        KasaError: an input or a setting is wrong, as `kasa run` would find.
        JobError: one lies outside `folder`, the working directory.
        WorkspaceError: the workspace is a relative path.
    """
    _check_workspace(recipe.workspace)
    check_form(recipe.data)
    found = [("the recipe", recipe_file)]
    for side in ("train", "heldout", "calibration"):
        for entry in getattr(recipe.data, side):
            files = [] if _is_elsewhere(entry) else resolve_source(entry, f"data.{side}", recipe.workspace, fetch=False)
            if not entry.startswith((EMBEDDED, HUB)):
                found += [(f"data.{side} {entry}", file) for file in files or []]
    if not _is_elsewhere(recipe.base.model):
        find_base(recipe.base, recipe.workspace, fetch=False)
        if Path(recipe.base.model).is_dir():
            found.append((f"base.model {recipe.base.model}", Path(recipe.base.model)))
    if recipe.train.deepspeed not in config_names() and not _is_elsewhere(recipe.train.deepspeed):
        found.append((f"train.deepspeed {recipe.train.deepspeed}", Path(recipe.train.deepspeed)))
    return [_inside(path, folder, what) for what, path in found]


def _check_workspace(workspace: Path) -> None:
    if not workspace.is_absolute() and not _URL.match(str(workspace)):
        raise WorkspaceError(
            f"the workspace {workspace} of a job would lie in the job's own temporary folder; name a folder on storage that "
            "all nodes share with workspace=/ABSOLUTE/PATH"
        )


def _is_elsewhere(name: str) -> bool:
    return user_path(name).is_absolute()


def _inside(path: Path, folder: Path, what: str) -> Path:
    # Not resolved: links in the folder that lead out of it are followed when the package is written.
    absolute = Path(os.path.normpath(folder / path))
    if not absolute.is_relative_to(folder):
        raise JobError(
            f"{what} lies outside the working directory {folder} that the job takes along; submit from a folder that holds "
            "it, or name it by an absolute path on storage that all nodes share"
        )
    return absolute


@dataclass(frozen=True)
class Package:
    """The files of a package by their name in it, and a digest of names, permissions and contents."""

    files: dict[str, Path]
    digest: str


def make_package(folder: Path, needed: Sequence[Path], workspace: Path) -> Package:
    """Choose the files of a package.

    Args:
        folder: the working directory.
        needed: files and folders in it that are taken along whatever `.gitignore` says.
        workspace: the recipe's workspace, which is left out if it lies in the folder.

    Raises:
        JobError: the files are too large for Ray, one cannot be read, or one is in the place of the pipeline's code or would
            hide a library.
    """
    with _readable():
        files = {
            file.relative_to(folder).as_posix(): file
            for file in _chosen(folder, (workspace.absolute(), folder.resolve()))
        }
        for path in needed:
            files |= {file.relative_to(folder).as_posix(): file for file in _all_files(path)}
        files |= _code(files)
        _refuse_shadows(files)
        _check_size(files)
        return Package(files, _digest(files))


@contextmanager
def _readable() -> Iterator[None]:
    """Name a file that cannot be read, or that went away since the folder was listed."""
    try:
        yield
    except OSError as error:
        raise JobError(
            f"{error.filename} would go along with the job and cannot be read: {error.strerror}; name it in .gitignore if the "
            "job does not need it"
        ) from None


def write_package(package: Package, archive: Path) -> None:
    """Write a package as a zip archive; the same files give the same bytes.

    Raises:
        JobError: a file went away since `make_package`.
    """
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for name in sorted(package.files):
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with _readable():
                entry.external_attr = (0o100755 if _is_executable(package.files[name]) else 0o100644) << 16
                source = package.files[name].open("rb")
            with source, out.open(entry, "w", force_zip64=True) as target:
                while block := source.read(2**20):
                    target.write(block)


def _chosen(
    folder: Path, left_out: tuple[Path, ...], rules: tuple[tuple[Path, GitIgnoreSpec], ...] = ()
) -> Iterator[Path]:
    """The files below a folder, without those that are ignored or lie in rubbish."""
    for file in (folder / ".gitignore", folder / ".rayignore"):
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            rules = (*rules, (folder, GitIgnoreSpec.from_lines(lines)))
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir()
        if _ignored(path, is_folder, rules):
            continue
        if path.is_file():
            yield path
        elif is_folder and not _is_rubbish(path, left_out):
            # Else a link to a folder that it lies in would be followed for ever.
            yield from _chosen(path, (*left_out, path.resolve()), rules)


def _is_rubbish(folder: Path, left_out: tuple[Path, ...]) -> bool:
    return (
        folder.name in RUBBISH
        or folder.name.endswith(".egg-info")
        or folder in left_out
        or (folder.is_symlink() and folder.resolve() in left_out)
        or any((folder / mark).exists() for mark in _MARKS)
    )


def _ignored(path: Path, is_folder: bool, rules: Iterable[tuple[Path, GitIgnoreSpec]]) -> bool:
    """Whether git would ignore a path: the last matching pattern decides, and deeper ignore files come later."""
    ignored = False
    for folder, spec in rules:
        name = path.relative_to(folder).as_posix() + ("/" if is_folder else "")
        verdict = spec.check_file(name).include
        ignored = ignored if verdict is None else verdict
    return ignored


def _all_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    else:
        yield from (file for file in sorted(path.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)


def _code(files: dict[str, Path]) -> dict[str, Path]:
    """The pipeline's own code, so that the job runs what was submitted, whatever the cluster has installed."""
    root = Path(pipeline.__file__).parent.parent
    code = {file.relative_to(root).as_posix(): file for name in CODE for file in _all_files(root / name)}
    for name in code.keys() & files.keys():
        if file_digest(code[name]) != file_digest(files[name]):
            raise JobError(
                f"{files[name]} stands where a job needs the pipeline's own {name}; rename it, or submit from another folder"
            )
    return code


def _refuse_shadows(files: dict[str, Path]) -> None:
    """A job looks for modules in its working directory first, in all of its processes."""
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    for name, file in files.items():
        module, is_module, rest = name.partition(".py")
        if (
            not is_module or rest or "/" in name or module in CODE
        ):  # the package beside it comes before a file of its name
            continue
        if module in sys.stdlib_module_names or PathFinder.find_spec(module, installed):
            raise JobError(
                f"a job would import {file} in place of the library {module}; rename it, or name it in .gitignore if the job "
                "does not need it"
            )


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{_is_executable(files[name]):d}\0{file_digest(files[name])}\n".encode())
    return digest.hexdigest()


def _check_size(files: dict[str, Path]) -> None:
    sizes = {name: file.stat().st_size for name, file in files.items()}
    total = sum(sizes.values()) + sum(_ENTRY_BYTES + 2 * len(name.encode()) for name in sizes)
    if total <= PACKAGE_LIMIT_BYTES:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_LARGEST_SHOWN]
    raise JobError(
        f"the {len(sizes):,} files that the job would take along have {total / 2**20:,.0f} MiB and Ray takes at most "
        f"{PACKAGE_LIMIT_BYTES / 2**20:,.0f}; the largest are "
        + ", ".join(f"{name} ({sizes[name] / 2**20:,.1f} MiB)" for name in largest)
        + "; put large data and models on shared storage and name them by absolute path, or name in .gitignore what the "
        "job does not need"
    )


def _is_executable(file: Path) -> bool:
    return bool(file.stat().st_mode & os.X_OK)
