"""`kasa doctor`: checks of what a run needs from this machine. Each changes nothing and names a remedy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.cluster.connection import check_address
from pipeline.core.machine import (
    GIB,
    Finding,
    answers,
    cpu_cores,
    existing_parent,
    memory_gib,
    package_index,
    side_by_side,
)
from pipeline.core.redaction import redacted, shell_command
from pipeline.tracking.server import check_store

_NETWORK_DEADLINE_S = 2.5
_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def examine(workspace: Path) -> list[Finding]:
    """Run all checks, in about three seconds without imports.

    Args:
        workspace: the recipe's workspace folder; it need not exist.
    """
    environment = os.environ
    network = {
        "Ray cluster": partial(check_address, environment.get("RAY_ADDRESS")),
        "MLflow": partial(check_store, environment.get("MLFLOW_TRACKING_URI")),
        "package index": partial(check_index, package_index()),
    }
    found = side_by_side(list(network.values()), _NETWORK_DEADLINE_S)
    requires_python, requirements = pins()
    return [
        check_python(platform.python_version(), requires_python),
        *check_packages(requirements, installed_versions(requirements)),
        check_cores(cpu_cores()),
        check_memory(memory_gib()),
        check_workspace(workspace),
        *check_gpus(visible_gpus()),
        check_compiler(shutil.which(environment.get("CXX", "g++"))),
        *(finding or _silent(name) for name, finding in zip(network, found, strict=True)),
        check_shared_memory(_free_gib(Path("/dev/shm"))),
        check_files(_file_limit()),
    ]


def pins(pyproject: Path = _PYPROJECT) -> tuple[str, list[Requirement]]:
    """(requires-python, dependencies), from pyproject.toml beside the package or else from the installed metadata."""
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], [Requirement(line) for line in project["dependencies"]]
    metadata = importlib.metadata.metadata("kasa-pipeline")
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    return metadata["Requires-Python"], [one for one in requirements if not one.marker or one.marker.evaluate()]


def installed_versions(requirements: list[Requirement]) -> dict[str, str]:
    """The version of each required package that is installed."""
    versions = {}
    for requirement in requirements:
        try:
            versions[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def check_python(version: str, wanted: str) -> Finding:
    """Check the interpreter's version against requires-python."""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("Python", "ok", f"{version} ({sys.executable})")
    return Finding("Python", "fail", f"{version}, wanted {wanted}", f"use a Python {wanted}")


def check_packages(requirements: list[Requirement], versions: Mapping[str, str]) -> list[Finding]:
    """Check packages against their pins: a finding for each wrong one, and one for all that are right."""
    wrong = []
    for pin in requirements:
        version = versions.get(pin.name)
        # A version with a local part (2.13.0+cpu) satisfies its pin, and a pre-release may.
        if version is None or not pin.specifier.contains(version, prereleases=True):
            detail = f"{version or 'not installed'}, wanted {pin.specifier}"
            wrong.append(Finding(pin.name, "fail", detail, shell_command("pip", "install", pin)))
    right = len(requirements) - len(wrong)
    exact = [
        f"{pin.name} {versions[pin.name]}"
        for pin in requirements
        if "==" in str(pin.specifier) and pin.name in versions
    ]
    return [*wrong, Finding("packages", "ok", f"{right} of {len(requirements)} as pinned ({', '.join(exact)})")]


def check_cores(cores: int) -> Finding:
    """Check the number of CPU cores that this process may use."""
    if cores >= 2:
        return Finding("CPU cores", "ok", str(cores))
    return Finding(
        "CPU cores", "warn", "1", "set train.workers and evaluate.workers to 1; stages run one after the other"
    )


def check_memory(gib: tuple[float, float] | None) -> Finding:
    """Check the available memory; the quickstart with two workers needs about 4 GiB."""
    if gib is None:
        return Finding("memory", "warn", "unknown: this system has no /proc/meminfo", "see that 4 GiB are free")
    total, available = gib
    detail = f"{available:.1f} of {total:.1f} GiB available"
    if available >= 4:
        return Finding("memory", "ok", detail)
    remedy = "close other programs, raise the container's limit, or set train.workers and evaluate.workers to 1"
    return Finding("memory", "warn" if available >= 2 else "fail", detail, remedy)


def check_workspace(workspace: Path) -> Finding:
    """Check that the workspace, or the nearest folder above it that exists, can be written and has room."""
    parent = existing_parent(workspace)
    if not parent.is_dir():
        return Finding("workspace", "fail", f"{parent} is a file", "choose another folder as the recipe's workspace")
    if not os.access(parent, os.W_OK | os.X_OK):
        remedy = "choose another folder as the recipe's workspace, or change its permissions"
        return Finding("workspace", "fail", f"{parent} cannot be written", remedy)
    free = _free_gib(parent) or 0.0
    detail = f"{workspace.absolute()}, {free:.1f} GiB free" + (
        "" if parent == workspace.absolute() else ", not made yet"
    )
    if free >= 5:
        return Finding("workspace", "ok", detail)
    return Finding("workspace", "warn" if free >= 1 else "fail", detail, f"free 5 GiB on the disk of {parent}")


def visible_gpus() -> list[tuple[str, float, tuple[int, int]]]:
    """(name, memory in GiB, compute capability) of every GPU that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [(one.name, one.total_memory / GIB, (one.major, one.minor)) for one in properties]


def check_gpus(gpus: list[tuple[str, float, tuple[int, int]]]) -> list[Finding]:
    """Check each GPU; bf16 in hardware starts with compute capability 8.0 (Ampere)."""
    if not gpus:
        return [
            Finding("GPU", "ok", "none seen by torch; leave train.gpu false and name a cpu_* file in train.deepspeed")
        ]
    return [_check_gpu(index, *gpu) for index, gpu in enumerate(gpus)]


def _check_gpu(index: int, name: str, gib: float, capability: tuple[int, int]) -> Finding:
    detail = f"{name}, {gib:.1f} GiB, compute capability {capability[0]}.{capability[1]}"
    if capability >= (8, 0):
        return Finding(f"GPU {index}", "ok", f"{detail}, bf16")
    return Finding(f"GPU {index}", "warn", f"{detail}, no bf16 in hardware", "set train.precision to fp32")


def check_compiler(path: str | None) -> Finding:
    """Look for a C++ compiler, which only DeepSpeed's own GPU and offload operators need."""
    if path:
        return Finding("C++ compiler", "ok", path)
    detail = "no g++; only DeepSpeed's compiled offload operators need one, the shipped configurations do not"
    return Finding("C++ compiler", "ok", detail)


def check_index(url: str) -> Finding:
    """Check that pip's index answers, which only a first run with an `embedded:` model or data set needs."""
    shown = redacted(url)
    if url.startswith("file:"):
        there = Path(url.removeprefix("file://")).exists()
        status, reason = (200, "") if there else (None, "no such folder")
    else:
        status, reason = answers(f"{url.rstrip('/')}/pip/")
    if status is not None and status < 500:
        return Finding("package index", "ok", shown)
    remedy = "needed once for `embedded:` sources; without a network name local paths in base.model and data.train"
    return Finding("package index", "warn", f"{shown}: {f'HTTP {status} ' if status else ''}{reason}", remedy)


def check_shared_memory(free_gib: float | None) -> Finding:
    """Check the room in /dev/shm, where Ray keeps objects; without it Ray uses a slow folder in /tmp."""
    if free_gib is None:
        return Finding("/dev/shm", "ok", "not on this system")
    if free_gib >= 1:
        return Finding("/dev/shm", "ok", f"{free_gib:.1f} GiB free")
    return Finding("/dev/shm", "warn", f"{free_gib:.2f} GiB free", "start the container with --shm-size=2g")


def check_files(limit: int | None) -> Finding:
    """Check the soft limit of open files; each Ray process opens hundreds."""
    if limit is None or limit >= 4096:
        return Finding("open files", "ok", "no limit" if limit is None else f"limit {limit}")
    return Finding("open files", "warn", f"limit {limit}", "ulimit -n 65536")


def _silent(name: str) -> Finding:
    remedy = "the name may not resolve; check the network"
    return Finding(name, "warn", f"no answer within {_NETWORK_DEADLINE_S} s", remedy)


def _free_gib(folder: Path) -> float | None:
    try:
        return shutil.disk_usage(folder).free / GIB
    except OSError:
        return None


def _file_limit() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    soft: Any = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else int(soft)
