"""The house: imports go down its floors, never up and never in a circle, and each outside system enters through one door."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest floor first. `docs/contributing.md` says what belongs where.
FLOORS = (
    ("kasa",),
    ("pipeline.core", "pipeline.metrics", "pipeline.config"),
    ("pipeline.cluster", "pipeline.storage", "pipeline.tracking", "pipeline.registry"),
    ("pipeline.models", "pipeline.data", "pipeline.methods"),
    ("pipeline.spectra", "pipeline.training", "pipeline.serving", "pipeline.evaluation", "pipeline.report"),
    ("pipeline.run",),
    ("pipeline.apps",),
    ("pipeline.cli", "ray_jobs"),
)
# Who may look at whom on its own floor.
NEIGHBOURS = {
    ("pipeline.config", "pipeline.core"),
    ("pipeline.config", "pipeline.metrics"),
    ("pipeline.metrics", "pipeline.core"),
    ("pipeline.registry", "pipeline.tracking"),
    ("pipeline.data", "pipeline.models"),
    ("pipeline.methods", "pipeline.models"),
    ("pipeline.evaluation", "pipeline.serving"),
    ("pipeline.report", "pipeline.evaluation"),
    ("ray_jobs", "pipeline.cli"),
}
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

METHOD_LIBRARIES = {"kasa", "torch", "numpy", "scipy", "threadpoolctl", "safetensors"}
DOORS = {
    # The last is no part of a run: a client of Ray's Jobs API, which speaks HTTP to a cluster and starts no Ray.
    "ray": {"pipeline/cluster/connection.py", "pipeline/cluster/workers.py", "pipeline/apps/job_client.py"},
    # The store, what is written to it, and MLflow's monitors of the machine; the registry, and what it serves.
    "mlflow": {
        "pipeline/tracking/availability.py",
        "pipeline/tracking/server.py",
        "pipeline/tracking/runs.py",
        "pipeline/tracking/live_metrics.py",
        "pipeline/registry/store.py",
        "pipeline/serving/served_model.py",
    },
    "fsspec": {"pipeline/storage/objects.py"},
    "deepspeed": {"pipeline/training/zero.py"},
    "peft": {"pipeline/methods/peft.py"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path for package in ("kasa", "pipeline", "ray_jobs") for path in (ROOT / package).rglob("*.py")
}


@cache
def imported(module: str) -> frozenset[str]:
    """What a module imports anywhere in it: our modules by their names, others by their top-level package."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by a relative name; write the whole one"
            names = [
                whole if (whole := f"{node.module}.{alias.name}") in MODULES else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        found |= {name if name in MODULES else name.partition(".")[0] for name in names}
    return frozenset(found - {module})


def room_of(module: str) -> str | None:
    return next((room for room in FLOOR_OF if module == room or module.startswith(f"{room}.")), None)


def arrows() -> Iterator[tuple[str, str, str, str]]:
    """(module, its room, imported module, that one's room) of all imports from room to room."""
    for module in sorted(MODULES):
        for other in sorted(imported(module) & MODULES.keys()):
            start, end = room_of(module), room_of(other)
            if start and end and start != end:
                yield module, start, other, end


def test_every_module_has_its_room() -> None:
    homeless = sorted(module for module in MODULES if not room_of(module) and module != "pipeline")
    assert not homeless, f"{homeless} stand outside the rooms in FLOORS; move them into one"


def test_imports_go_down() -> None:
    breaches = [
        f"{module} imports {other}: "
        + (
            "a lower floor must not know a higher one; move what it needs down, or hand it in as an argument"
            if FLOOR_OF[end] > FLOOR_OF[start]
            else f"{start} and {end} share a floor and are no NEIGHBOURS; move what both need one floor down"
        )
        for module, start, other, end in arrows()
        if FLOOR_OF[end] > FLOOR_OF[start] or (FLOOR_OF[end] == FLOOR_OF[start] and (start, end) not in NEIGHBOURS)
    ]
    assert not breaches, "\n".join(breaches)


def test_no_two_rooms_import_each_other() -> None:
    pairs = {(start, end) for _, start, _, end in arrows()}
    mutual = sorted(pair for pair in pairs if pair[::-1] in pairs and pair < pair[::-1])
    assert not mutual, f"{mutual} import each other; one of each pair must give way"
    unused = NEIGHBOURS - pairs
    assert not unused, f"nobody uses the doors {sorted(unused)}; take them out of NEIGHBOURS"


def test_no_import_circles() -> None:
    """Imports inside of functions count: they too say who knows whom."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import circle: {' -> '.join([*path[path.index(module) :], module])}; cut it"
        if module in done:
            return
        for other in sorted(imported(module) & MODULES.keys()):
            visit(other, (*path, module))
        done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def test_the_method_stands_on_few_libraries() -> None:
    for module in MODULES:
        if module.partition(".")[0] == "kasa":
            packages = {name.partition(".")[0] for name in imported(module)}
            foreign = packages - METHOD_LIBRARIES - set(sys.stdlib_module_names)
            assert not foreign, (
                f"{module} imports {sorted(foreign)}: the method library stands on {sorted(METHOD_LIBRARIES)} alone; "
                "move what needs more into pipeline/"
            )


@pytest.mark.parametrize("package", DOORS)
def test_outside_systems_enter_by_one_door(package: str) -> None:
    users = {path.relative_to(ROOT).as_posix() for module, path in MODULES.items() if package in imported(module)}
    assert users <= DOORS[package], (
        f"{sorted(users - DOORS[package])} import {package}: call a function of {' or '.join(sorted(DOORS[package]))}, "
        "adding one if need be, so that an upgrade stays one file's work"
    )
    assert users >= DOORS[package], (
        f"{sorted(DOORS[package] - users)} no longer import {package}; take them out of DOORS"
    )
