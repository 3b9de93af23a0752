"""Checks that a recipe can run on a cluster, before anything is sent and with the errors of a run."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.config.deepspeed import complete_config, config_names, load_deepspeed_config
from pipeline.config.recipe import Recipe
from pipeline.core.errors import JobError, WorkspaceError
from pipeline.data.forms import check_form
from pipeline.data.sources import HUB, resolve_source
from pipeline.methods.choice import check_registrable
from pipeline.models.base import find_base
from pipeline.models.embedded import PREFIX as EMBEDDED

_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")


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
    check_registrable(recipe)
    check_form(recipe.data)
    complete_config(load_deepspeed_config(recipe.train.deepspeed), recipe.train)
    found = [("the recipe", recipe_file)]
    for side in ("train", "heldout", "calibration"):
        for entry in getattr(recipe.data, side):
            files = [] if _is_elsewhere(entry) else resolve_source(entry, f"data.{side}", recipe.workspace, fetch=False)
            if not entry.startswith((EMBEDDED, HUB)):
                found += [(f"data.{side} {entry}", file) for file in files or []]
    if not _is_elsewhere(recipe.base.model):
        base = find_base(recipe.base, recipe.workspace, fetch=False)
        if base is not None and Path(recipe.base.model).is_dir():
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
    return Path(name).expanduser().is_absolute()


def _inside(path: Path, folder: Path, what: str) -> Path:
    # Not resolved: links in the folder that lead out of it are followed when the package is written.
    absolute = Path(os.path.normpath(folder / path))
    if not absolute.is_relative_to(folder):
        raise JobError(
            f"{what} lies outside the working directory {folder} that the job takes along; submit from a folder that holds "
            "it, or name it by an absolute path on storage that all nodes share"
        )
    return absolute
