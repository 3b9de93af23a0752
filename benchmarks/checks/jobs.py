"""Jobs on a real Ray head: submitted by Ray's own command and by `kasa submit`, failing, killed, stopped, cut off."""

from __future__ import annotations

from benchmarks.core import Measurement, Setting, check
from tests.support.job_scenarios import SCENARIOS, Findings, Jobs
from tests.support.ray_head import ray_head
from tests.support.tiny_inputs import write_tiny_inputs


@check(bar=0, direction="at most", unit="expectations that fail")
def ray_jobs(setting: Setting) -> Measurement:
    """Jobs on a real Ray head: logs, exit codes, the same one twice, dead driver, Ctrl-C, lost connection, no token."""
    folder = setting.scratch / "jobs"
    folder.mkdir()
    write_tiny_inputs(folder)
    found = Findings()
    with ray_head(cpus=2) as head:
        for scenario in SCENARIOS:
            scenario(Jobs(folder, head), found)
    return Measurement(
        len(found.failed), {"expectations": found.looked_at, "failed": found.failed}, flaws=tuple(found.failed)
    )
