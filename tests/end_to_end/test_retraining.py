"""`kasa retrain` for real, as a scheduler calls it; and what a tick with nothing to do must not load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.retraining import Retraining
from tests.support.tiny_run import make_bench


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.xdist_group("faults")
def test_a_scheduler_may_call_it_as_it_likes(tmp_path: Path) -> None:
    folder = make_bench(tmp_path / "bench").folder
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["train"] = "rows"
    recipe["evaluate"]["metric"] = "loss"  # which six steps improve
    recipe["train"] |= {"start": "champion", "learning_rate": 0.01, "workers": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "rows").mkdir()
    (folder / "rows.jsonl").rename(folder / "rows" / "monday.jsonl")

    def add_rows() -> None:
        rows = [{"prompt": f"count {n % 7} from {n}", "completion": f"{n} {n + n % 7} done"} for n in range(200, 260)]
        (folder / "rows" / "tuesday.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    scenario = Retraining(folder, "tiny", add_rows)
    scenario.run()
    assert scenario.flaws == []
    # A loaded machine may take its time; the check measures it.
    assert max(scenario.noop_seconds) < 30


@pytest.mark.processes
def test_a_tick_with_nothing_to_do_loads_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, pipeline.cli.main, pipeline.apps.retrain; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "ray", "mlflow", "deepspeed", "datasets", "numpy", "scipy", "pandas", "pyarrow"}
    assert heavy & set(done.stdout.split()) == set()
