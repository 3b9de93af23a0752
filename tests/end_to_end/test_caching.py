"""The checks of caching and of a killed driver, as tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checks.caching import cache_precision, driver_kill
from benchmarks.core import Check, Setting, judge

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.xdist_group("end_to_end")]


@pytest.mark.parametrize("one", [cache_precision, driver_kill], ids=lambda one: one.name)
def test_nothing_is_made_twice_and_nothing_is_left_out(tmp_path: Path, one: Check) -> None:
    measurement = one.measure(Setting(tmp_path / "workspace", tmp_path))
    assert measurement.flaws == ()
    assert judge(one, measurement)[1]
