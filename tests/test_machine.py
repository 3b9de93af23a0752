"""Cores and memory as machines and containers (cgroup v1 and v2) tell them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.machine import GIB, cpu_cores, memory_gib


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


def _fill(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content + "\n")
