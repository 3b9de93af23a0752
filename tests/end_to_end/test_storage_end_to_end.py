"""Real runs whose workspace is a bucket of an S3-compatible server, with MLflow behind a server of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.run.graph import STAGES
from pipeline.storage.objects import ObjectStore
from tests.support.processes import beneath, end_all, start_kasa, wait_for
from tests.support.s3_server import S3Server, serving
from tests.support.tiny_inputs import STEPS
from tests.support.tiny_run import PATIENCE_S, Bench, parents, runs_under
from tests.support.tracking_server import tracking_server

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.xdist_group("end_to_end")]


@dataclass
class Remote:
    """A bench whose runs go to a bucket; `cache` stands for the disk of the machine that they run on."""

    bench: Bench
    s3: S3Server
    mlflow: str
    cache: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**self.s3.environment, "MLFLOW_TRACKING_URI": self.mlflow, "KASA_CACHE": str(self.cache)}

    def start(self, workspace: str, **environment: str) -> Any:
        return self.bench.start(workspace, environment=self.environment | environment)

    def run(self, workspace: str, **environment: str) -> dict[str, Any]:
        return self.bench.finish(self.start(workspace, **environment))

    def lose_machine(self) -> None:
        shutil.rmtree(self.cache)

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.mlflow, self.mlflow)


@pytest.fixture(scope="module")
def remote(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with (
        serving() as s3,
        tracking_server(tmp_path_factory.mktemp("mlflow")) as mlflow,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        yield Remote(bench, s3, mlflow.uri, tmp_path_factory.mktemp("cache"))


def named(store: ObjectStore, name: str) -> list[str]:
    """The objects of that name below the training's artifacts."""
    return [found for found in store.versions("artifacts/train") if Path(found).name == name]


def adapter_of(result: dict[str, Any]) -> bytes:
    return (Path(result["artifacts"]["train"]) / "adapter" / "tensors.safetensors").read_bytes()


def test_the_machine_may_be_lost_at_any_time(remote: Remote, bench: Bench, first: dict[str, Any]) -> None:
    url = f"{remote.s3.new_bucket()}/kasa"
    store = ObjectStore(url)

    # Killed in the middle of training, and nothing of its disk is left.
    process = remote.start(url)
    wait_for(lambda: named(store, "checkpoint.json") and named(store, "journal.jsonl"), process, PATIENCE_S)
    ray_processes = beneath(process)
    process.kill()
    process.wait()
    end_all(ray_processes)
    psutil.wait_procs(ray_processes)
    assert not named(store, "manifest.json")
    step = max(int(Path(name).parent.name.removeprefix("step-")) for name in named(store, "checkpoint.json"))
    (journal,) = named(store, "journal.jsonl")
    before = (store.read(f"artifacts/train/{journal}") or (b"", ""))[0].splitlines()[:step]
    assert len(before) == step > 0
    (interrupted,) = parents(remote.client())
    remote.lose_machine()

    result = remote.run(url)
    assert result["run_id"] == interrupted.info.run_id
    assert result["stages"] == dict.fromkeys(STAGES, "computed") | dict.fromkeys(STAGES[:3], "reused")
    local = bench.folder / first["artifacts"]["train"] / "adapter" / "tensors.safetensors"
    assert adapter_of(result) == local.read_bytes()
    # Times are in the journal too: those steps were not done again.
    assert (Path(result["artifacts"]["train"]) / "journal.jsonl").read_bytes().splitlines()[:step] == before
    history = remote.client().get_metric_history(result["stage_runs"]["train"], "loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))

    # What is left in the bucket is complete artifacts and the report.
    names = store.versions("")
    assert not [name for name in names if ".partial" in name or name.startswith("runs/")]
    assert [name for name in names if name.startswith("reports/")]

    remote.lose_machine()
    again = remote.run(url)
    assert again["stages"] == dict.fromkeys(STAGES, "reused")
    assert again["model"]["version"] == result["model"]["version"]
    assert adapter_of(again) == adapter_of(result)
    assert len(runs_under(remote.client(), again["run_id"])) == len(STAGES)

    # The registry is the server's; the folder of the URL on this machine is all that the command needs.
    asked = start_kasa(
        ["generate", f"models:/tiny/{result['model']['version']}", "count 3 from 5", "--workspace", url],
        bench.folder,
        remote.environment,
    )
    out, err = asked.communicate(timeout=PATIENCE_S)
    assert asked.returncode == 0, err
    assert len(out.splitlines()) == 1


@pytest.fixture
def worker_node(remote: Remote, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a cluster whose head has no cores, and the cache of its other node, which sees no other's."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KASA_CACHE", str(tmp_path / "worker"))
            nodes.add_node(num_cpus=2)
        yield nodes.address, tmp_path / "worker"
    finally:
        nodes.shutdown()


@pytest.mark.soak
def test_nodes_need_no_common_disk(
    remote: Remote, bench: Bench, first: dict[str, Any], worker_node: tuple[str, Path]
) -> None:
    address, cache = worker_node
    result = remote.run(f"{remote.s3.new_bucket()}/kasa", RAY_ADDRESS=address)
    local = bench.folder / first["artifacts"]["train"] / "adapter" / "tensors.safetensors"
    assert adapter_of(result) == local.read_bytes()
    assert result["metrics"] == first["metrics"]
    (copy,) = cache.iterdir()
    # All work was done there, on base, data and artifacts that it fetched.
    assert len(list((copy / "inputs").glob("*/*.safetensors"))) == 1
    assert {folder.name for folder in (copy / "artifacts").iterdir()} >= {"prepare", "spectra", "train", "evaluate"}
    history = remote.client().get_metric_history(result["stage_runs"]["train"], "loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    assert os.path.samefile(Path(result["artifacts"]["train"]).parents[3], remote.cache)
