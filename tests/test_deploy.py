"""What deploy/ and docs/cluster.md say agrees with Kubernetes' and KubeRay's schemas and with the code."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml

from pipeline.cli.main import app
from pipeline.config.deepspeed import complete_config, load_deepspeed_config
from pipeline.config.recipe import Recipe, parse_recipe
from pipeline.run.graph import needed_resources
from tests.support import ROOT
from tests.support.kuberay import SCHEMAS

DEPLOY = ROOT / "deploy"
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in (DEPLOY / "kubernetes").glob("*.yaml")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
JOBS = {"rayjob": MANIFESTS["rayjob"]["spec"], "raycronjob": MANIFESTS["raycronjob"]["spec"]["jobTemplate"]}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's spec, by what it is for."""
    yield "cronjob", MANIFESTS["cronjob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    for name, job in JOBS.items():
        cluster = job["rayClusterSpec"]
        yield f"{name} head", cluster["headGroupSpec"]["template"]["spec"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{name} {group['groupName']}", group["template"]["spec"]


PODS = dict(pods())


def recipe() -> Recipe:
    (text,) = MANIFESTS["recipe"]["data"].values()
    return parse_recipe(yaml.safe_load(text), "recipe.yaml")


def check_command(line: list[str]) -> list[str]:
    """Parse a `kasa` command, or a job's `python -m` command, by the real command line; the arguments that are paths."""
    if line[:2] == ["python", "-m"]:
        module = importlib.import_module(line[2])
        assert callable(module.run_job)
        line = ["kasa", {"run_pipeline": "run", "retrain": "retrain"}[line[2].removeprefix("ray_jobs.")], *line[3:]]
    assert Path(line[0]).name == "kasa"
    command = typer.main.get_command(app)
    context = command.make_context("kasa", line[1:])
    name, sub, rest = command.resolve_command(context, line[1:])  # type: ignore[attr-defined]
    assert sub is not None, name
    parsed = sub.make_context(name, rest, parent=context).params
    assert all("=" in override for override in parsed.get("overrides") or [])
    return [part.rpartition("=")[2] for part in line[2:] if part.rpartition("=")[2].startswith("/")]


def commands() -> dict[str, list[str]]:
    (container,) = PODS["cronjob"]["containers"]
    return {"cronjob": ["kasa", *container["args"]]} | {
        name: shlex.split(job["entrypoint"]) for name, job in JOBS.items()
    }


@pytest.mark.parametrize("name", ["storage", "recipe", "cronjob"])
def test_kubernetes_accepts_it(name: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], "1.37", strict=True)


@pytest.mark.parametrize("name", ["rayjob", "raycronjob"])
def test_kuberay_accepts_it(name: str) -> None:
    jsonschema.validate(MANIFESTS[name], SCHEMAS[MANIFESTS[name]["kind"]])


@pytest.mark.parametrize("name", PODS)
def test_pods_are_whole_and_unprivileged(name: str) -> None:
    pod = PODS[name]
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": {"spec": pod}}
    kubernetes_validate.validate(template, "1.37", strict=True)
    (container,) = pod["containers"]
    assert container["image"] == f"registry.example.com/kasa:{PROJECT['version']}"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    uid = int(re.findall(r"^USER (\d+)$", CONTAINERFILE, re.MULTILINE)[0])
    assert f"useradd --uid {uid} " in CONTAINERFILE
    assert pod["securityContext"]["runAsUser"] == uid
    assert pod["securityContext"]["runAsNonRoot"]
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {MANIFESTS["storage"]["metadata"]["name"]}
    maps = {v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v}
    assert maps == {MANIFESTS["recipe"]["metadata"]["name"]}


@pytest.mark.parametrize("name", ["cronjob", "rayjob", "raycronjob"])
def test_commands_run_the_recipe_that_is_mounted(name: str) -> None:
    paths = check_command(commands()[name])
    for pod in (pod for where, pod in PODS.items() if where.split()[0] == name):
        (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "recipe"]
        assert paths == [f"{mount['mountPath']}/{key}" for key in MANIFESTS["recipe"]["data"]]


def test_the_recipe_keeps_everything_on_the_shared_volume() -> None:
    found = recipe()
    complete_config(load_deepspeed_config(found.train.deepspeed), found.train)
    (mount,) = [m for m in PODS["cronjob"]["containers"][0]["volumeMounts"] if m["name"] == "shared"]
    for path in (str(found.workspace), found.base.model, *found.data.train):
        assert path.startswith(f"{mount['mountPath']}/")


@pytest.mark.parametrize("name", ["cronjob", "rayjob", "raycronjob"])
def test_there_are_the_cores_and_gpus_that_the_recipe_asks_for(name: str) -> None:
    if name == "cronjob":
        groups = [(1, PODS["cronjob"])]
    else:
        cluster = JOBS[name]["rayClusterSpec"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["rayVersion"] == version("ray")
        groups = [(group["minReplicas"], group["template"]["spec"]) for group in cluster["workerGroupSpecs"]]
    resources = [(count, pod["containers"][0]["resources"]) for count, pod in groups]
    whole = recipe().model_copy(update={"train": recipe().train.model_copy(update={"min_workers": None})})
    cpus, gpus = needed_resources(whole)
    assert sum(count * float(one["requests"]["cpu"]) for count, one in resources) >= cpus
    assert sum(count * int(one["limits"]["nvidia.com/gpu"]) for count, one in resources) == gpus


def test_the_cronjob_does_not_repeat_a_mistake() -> None:
    spec = MANIFESTS["cronjob"]["spec"]
    job = spec["jobTemplate"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["concurrencyPolicy"] == "Forbid"


def test_retraining_on_kuberay_is_the_run_on_kuberay_with_another_command() -> None:
    assert JOBS["raycronjob"] == JOBS["rayjob"] | {"entrypoint": JOBS["raycronjob"]["entrypoint"]}


RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def check_schedule(fields: list[str]) -> None:
    """Five fields of cron: numbers, `*`, ranges, steps and lists, within their ranges."""
    assert len(fields) == len(RANGES)
    for field, (low, high) in zip(fields, RANGES, strict=True):
        for part in field.split(","):
            match = re.fullmatch(r"(\*|(\d+)(-(\d+))?)(/[1-9]\d*)?", part)
            assert match, field
            assert all(low <= int(number) <= high for number in match.group(2, 4) if number), field


@pytest.mark.parametrize("name", ["cronjob", "raycronjob"])
def test_schedules_of_manifests(name: str) -> None:
    check_schedule(MANIFESTS[name]["spec"]["schedule"].split())


@pytest.mark.parametrize(
    "wrong", ["0 24 * * *", "60 2 * * *", "0 2 * *", "0 2 0 * *", "0 2 * * mon,8", "@daily * * * *"]
)
def test_wrong_schedules_are_noticed(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_schedule(wrong.split())


def test_the_cron_line() -> None:
    lines = (DEPLOY / "cron" / "kasa-retrain").read_text().splitlines()
    entries = [line for line in lines if line and not line.startswith("#") and not re.match(r"[A-Z]+=", line)]
    assert len(entries) == 1
    assert "%" not in entries[0]
    *fields, user, command = entries[0].split(maxsplit=6)
    check_schedule(fields)
    assert user == service()["User"]
    change, retrain = command.split(" && ")
    assert change == f"cd {service()['WorkingDirectory']}"
    check_command(shlex.split(retrain.partition(" 2>&1 | logger ")[0]))
    assert shlex.split(retrain.partition(" 2>&1 | ")[0]) == shlex.split(service()["ExecStart"])


def service() -> dict[str, str]:
    lines = (DEPLOY / "systemd" / "kasa-retrain.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_the_systemd_unit_runs_a_real_command_and_may_write_its_workspace() -> None:
    unit = service()
    recipe_path, workspace = check_command(shlex.split(unit["ExecStart"]))
    assert recipe_path.startswith("/etc/kasa/")
    assert workspace.startswith(unit["ReadWritePaths"])
    assert unit["WorkingDirectory"] == unit["ReadWritePaths"]
    assert unit["RestartPreventExitStatus"] == "2"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("spoilt", [False, True])
def test_systemd_accepts_the_units(tmp_path: Path, spoilt: bool) -> None:
    for path in (DEPLOY / "systemd").iterdir():
        text = path.read_text().replace("/opt/kasa/bin/kasa", str(Path(sys.executable).with_name("kasa")))
        (tmp_path / path.name).write_text(text.replace("Type=oneshot", "Tipe=oneshot") if spoilt else text)
    units = [str(tmp_path / f"kasa-retrain.{kind}") for kind in ("service", "timer")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert ("Tipe" in done.stderr) == spoilt
    assert (done.returncode == 0 and not done.stderr) != spoilt, done.stderr


def test_the_containerfile_copies_all_of_the_package_and_starts_a_real_command() -> None:
    copied = [part for line in re.findall(r"^COPY (.+) \./?\S*$", CONTAINERFILE, re.MULTILINE) for part in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.partition(".")[0] for package in packages} <= set(copied)
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "constraints.txt"} <= set(copied)
    assert "pip install --no-cache-dir --constraint constraints.txt ." in CONTAINERFILE
    assert re.findall(r'^ENTRYPOINT \["(\w+)"\]$', CONTAINERFILE, re.MULTILINE) == list(PROJECT["scripts"])
    ignored = (ROOT / ".containerignore").read_text().splitlines()
    assert "*" in ignored
    assert {f"!{name}" for name in copied} <= set(ignored)
    python = re.findall(r"^FROM docker.io/library/python:([\d.]+)-slim$", CONTAINERFILE, re.MULTILINE)
    assert fnmatch(PROJECT["requires-python"], f">={python[0]}")


def documented_commands() -> list[str]:
    text = (ROOT / "docs" / "cluster.md").read_text()
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in re.sub(r"\\\n *", "", block).splitlines()]
    return [line for line in lines if line.startswith("kasa ") or " -- python -m ray_jobs." in line]


def test_documented_commands_are_real() -> None:
    found = documented_commands()
    assert {"kasa submit", "ray job"} <= {" ".join(line.split()[:2]) for line in found}
    for line in found:
        check_command(shlex.split(line.rpartition(" -- ")[2]))


def test_every_file_is_documented() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        assert f"](../{path.relative_to(ROOT).as_posix()})" in text, path
    for link in re.findall(r"\]\((\.\./[^)#]+)", text):
        assert (ROOT / "docs" / link).exists(), link
