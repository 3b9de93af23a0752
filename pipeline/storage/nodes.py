"""Work on other nodes: the paths that a job names exist there before it begins, and what it writes comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.storage.mirror import MANIFEST
from pipeline.storage.places import ARTIFACTS, COMPLETE, INPUTS, PARTIAL

if TYPE_CHECKING:
    from pipeline.storage.workspace import Workspace

Result = TypeVar("Result")


class OnNode(Generic[Result]):
    """A function of a job, to be sent to another node; `home` is the workspace of the node that sends it."""

    def __init__(self, home: Workspace, function: Callable[..., Result]) -> None:
        self._home, self._function = home, function

    def __call__(self, job: Any, *others: Any) -> Result:
        home, here = self._home, self._home.here()
        moved = replace_paths(job, lambda path: home.path_on(here, path))
        with ExitStack() as mirrors:
            for folder in [] if here.is_same_node(home) else sorted(_units(moved, here.folder)):
                if folder.name.endswith(PARTIAL):
                    mirrors.enter_context(here.mirrored(folder, None))
                else:
                    here.fetch(folder, COMPLETE if folder.parent.name == INPUTS else MANIFEST)
            return self._function(moved, *others)


def replace_paths(value: Any, change: Callable[[Path], Path]) -> Any:
    """`value` with every path changed, in dataclasses, tuples, lists and dictionaries too."""
    if isinstance(value, Path):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {name: replace_paths(one, change) for name, one in old.items()}
        return dataclasses.replace(value, **new) if any(new[name] is not old[name] for name in old) else value
    if isinstance(value, list | tuple):
        changed = [replace_paths(one, change) for one in value]
        same = all(new is old for new, old in zip(changed, value, strict=True))
        return value if same else type(value)(changed)
    if isinstance(value, dict):
        return {name: replace_paths(one, change) for name, one in value.items()}
    return value


def _units(job: Any, root: Path) -> set[Path]:
    """The folders that are fetched or mirrored as a whole: those in which the paths of a job lie."""
    units: set[Path] = set()

    def note(path: Path) -> Path:
        parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
        if parts and parts[0] == ARTIFACTS and len(parts) >= 3:
            units.add(root.joinpath(*parts[:3]))
        elif parts and parts[0] == INPUTS and len(parts) >= 2:
            units.add(root.joinpath(*parts[:2]))
        return path

    replace_paths(job, note)
    return units
