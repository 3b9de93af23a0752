"""Imports go one way, `ray_jobs -> pipeline -> kasa`, and each outside system enters through one door."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for package in ("kasa", "pipeline", "ray_jobs") for path in (ROOT / package).rglob("*.py"))
METHOD_LIBRARIES = {"kasa", "torch", "numpy", "scipy", "threadpoolctl", "safetensors"}
# The store, what is written to it, and MLflow's monitors of the machine.
_TRACKING = ("store", "runs", "system_metrics")
DOORS = {
    # The second is no part of a run: a client of Ray's Jobs API, which speaks HTTP to a cluster and starts no Ray.
    "ray": {"pipeline/cluster.py", "pipeline/jobs/client.py"},
    "mlflow": {f"pipeline/tracking/{part}.py" for part in _TRACKING}
    | {f"pipeline/registry/{part}.py" for part in ("store", "served_model", "served_labels")},
    "fsspec": {"pipeline/storage/objects.py"},
    "deepspeed": {"pipeline/training/zero.py"},
    "peft": {"pipeline/methods/peft_methods.py"},
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    name, packages = name_of(path), imported(path)
    if name.startswith("kasa/"):
        foreign = packages - METHOD_LIBRARIES - set(sys.stdlib_module_names)
        assert not foreign, (
            f"{name} imports {sorted(foreign)}: the method library stands on {sorted(METHOD_LIBRARIES)} alone; "
            "move what needs more into pipeline/"
        )
    if name.startswith("pipeline/"):
        assert "ray_jobs" not in packages, (
            f"{name} imports ray_jobs: jobs call the pipeline, not the other way; move it"
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_outside_systems_enter_by_one_door(path: Path) -> None:
    for package, doors in DOORS.items():
        assert package not in imported(path) or name_of(path) in doors, (
            f"{name_of(path)} imports {package}: call a function of {' or '.join(sorted(doors))}, adding one if need be, "
            "so that an upgrade stays one file's work"
        )


def test_every_door_is_used() -> None:
    for package, doors in DOORS.items():
        for door in doors:
            assert package in imported(ROOT / door), f"{door} no longer imports {package}; take it out of DOORS"
