"""Cores and memory as machines and containers (cgroup v1 and v2) tell them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import settings as training
from pipeline.core.machine import GIB, cpu_cores, fast_precision, memory_gib


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cores_of_a_container(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    _fill(tmp_path, files)
    assert cpu_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (16, 12)),
        ({"memory.max": "max", "memory.current": "5"}, (16, 12)),
        ({"memory.max": str(8 * GIB), "memory.current": str(3 * GIB)}, (8, 5)),
        ({"memory.max": str(15 * GIB), "memory.current": str(GIB)}, (15, 12)),
        ({"memory.max": str(GIB), "memory.current": str(2 * GIB)}, (1, 0)),
        ({"memory/memory.limit_in_bytes": str(4 * GIB), "memory/memory.usage_in_bytes": str(GIB)}, (4, 3)),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "1"}, (16, 12)),
    ],
)
def test_memory_of_a_container(files: dict[str, str], expected: tuple[int, int], tmp_path: Path) -> None:
    _fill(tmp_path, files)
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {16 * 2**20} kB\nMemAvailable: {12 * 2**20} kB\n")
    assert memory_gib(tmp_path, meminfo) == expected
    assert memory_gib(tmp_path, tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("flags", "gpu", "expected"),
    [
        ("fpu avx avx2 fma", False, "fp32"),
        ("fpu avx2 avx512f avx512_bf16 amx_tile", False, "bf16"),
        ("fpu avx512f amx_bf16", False, "bf16"),
        ("fp asimd i8mm bf16", False, "bf16"),
        ("fpu avx2", True, "bf16"),
    ],
)
def test_bf16_where_the_hardware_has_it(flags: str, gpu: bool, expected: str, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert fast_precision(gpu, cpuinfo) == expected
    assert fast_precision(False, tmp_path / "absent") == "fp32"


def test_a_recipe_says_which_precision_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fast_precision", lambda gpu: "bf16" if gpu else "fp32")
    for given, gpu, expected in (("auto", False, "fp32"), ("auto", True, "bf16"), ("bf16", False, "bf16")):
        assert training.TrainSettings(precision=given, gpu=gpu).precision == expected  # type: ignore[arg-type]
    assert training.TrainSettings().model_dump()["precision"] == "fp32"


def _fill(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content + "\n")
