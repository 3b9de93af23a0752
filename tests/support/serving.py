"""A registered model in other processes: loaded by a stranger without pickle, and behind `mlflow models serve`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from kasa import attach_saved, read_adapter
from pipeline.models.loading import load_base
from pipeline.serving.logits import logits_of
from tests.support import fresh_process
from tests.support.tracking_server import free_port

PATIENCE_S = 300.0


@dataclass(frozen=True)
class Stranger:
    """What a fresh process made of a model.

    Attributes:
        answers, logits: to what it was asked.
        own, strange: files of our packages that it ran: those that lie with the model, and others.
    """

    answers: list[str]
    logits: list[torch.Tensor]
    own: list[Path]
    strange: list[Path]


def surroundings(database: Path) -> dict[str, str]:
    """An environment without this checkout, in which MLflow finds a workspace's registry and refuses pickles."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_", "KASA_", "PYTHONPATH"))}
    return kept | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{database.resolve()}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }


def load_as_stranger(
    uri: str, prompts: Sequence[str], sequences: Sequence[torch.Tensor], database: Path, scratch: Path
) -> Stranger:
    """Load the model in a fresh process outside this checkout, with pickle forbidden.

    Raises:
        RuntimeError: that process failed; with the end of what it said.
    """
    request, out = scratch / "request.json", scratch / "stranger"
    values = {"prompts": list(prompts), "sequences": [ids[0].tolist() for ids in sequences]}
    request.write_text(json.dumps(values), encoding="utf-8")
    command = [sys.executable, "-P", str(Path(fresh_process.__file__).resolve()), uri, str(request), str(out)]
    done = subprocess.run(
        command,
        cwd=scratch,
        env=surroundings(database),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"loading {uri} ended with {done.returncode}: {done.stderr[-3000:]}")
    found = json.loads((out / "answer.json").read_text(encoding="utf-8"))
    tensors = load_file(out / "logits.safetensors")
    logits = [tensors[str(index)] for index in range(len(sequences))]
    own, strange = ([Path(file) for file in found[kind]] for kind in ("own", "strange"))
    return Stranger(found["answers"], logits, own, strange)


def adapter_logits(
    base: Path, adapter: Path, precision: str, sequences: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(base's, base and adapter's) logits in this process, without MLflow."""
    model = load_base(base, precision)
    plain = [one.float() for one in logits_of(model, sequences)]
    attach_saved(model, read_adapter(adapter))
    return plain, [one.float() for one in logits_of(model, sequences)]


def apart(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest absolute difference, as a share of the largest logit of `theirs`."""
    largest = max(float(one.abs().max()) for one in theirs)
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True)) / largest


@contextmanager
def served(uri: str, database: Path, log: Path) -> Iterator[str]:
    """`mlflow models serve` on a free port within the block, ready to answer; its address.

    Raises:
        RuntimeError: the server ended, or was not ready in time; with the end of what it said.
    """
    port = free_port()
    command = [sys.executable, "-P", "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=log.parent,
            # The server finds the interpreter's own `mlflow` and `uvicorn` by PATH.
            env=surroundings(database) | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(address, process, log)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(address: str, prompts: Sequence[str], parameters: Mapping[str, int] | None = None) -> list[str]:
    """The served model's answers."""
    body = {"inputs": list(prompts), **({"params": dict(parameters)} if parameters else {})}
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        answers: list[str] = json.load(response)["predictions"]
    return answers


def _wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/ping", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"no server (exit code {process.poll()}): {log.read_text(encoding='utf-8')[-3000:]}")
