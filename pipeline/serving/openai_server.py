"""An OpenAI-compatible endpoint for one model: the work of `kasa serve`, which `transformers serve` does.

That server looks a request's `model` up in the hub's cache. It gets a cache of its own, which holds the merged model under the
name that requests give, and no way to the hub.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch

from kasa import merge
from kasa.adapter_file import ADAPTER_JSON
from pipeline.core import stopping
from pipeline.core.console import PLAIN_INTERVAL_S, console
from pipeline.core.errors import ModelError
from pipeline.core.files import user_path
from pipeline.core.machine import fast_precision
from pipeline.methods.loading import is_adapter, merge_other
from pipeline.models.loading import DTYPES, load_base
from pipeline.models.prompting import Head, Prompting, load_tokenizer
from pipeline.registry.store import SCHEME
from pipeline.serving.answer import base_of, is_merged, located_adapter
from pipeline.serving.export import beside_weights, chat_request, model_source

_REVISION = "0" * 40  # the cache names a snapshot by a commit; any will do
_LAST_LINES = 5
_LONGEST_NAME = 96  # of a repository, for the hub's client
_ANSWER_S, _POLL_S = 5.0, 0.3
_END_S = stopping.GRACE_S / 2  # the rest is for removing the merged model
# On every address of this machine: what it is asked at from here.
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# A proxy that the surroundings name knows no server of this machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        address: such as `http://127.0.0.1:8000`; the interface is below `/v1`.
        name: what requests give as `model`.
        request: a command that asks it; None where the model knows no form of chats.
    """

    address: str
    name: str
    request: str | None
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> None:
        """Return never: the server answers until this process is asked to stop.

        Raises:
            Stopped: this process has been asked to stop.
            ModelError: the server ended by itself.
        """
        while self.process.poll() is None:
            stopping.pause(_POLL_S)
        raise _ended(self.process, self.log)


@contextmanager
def serving(model: str, workspace: Path, base: Path | None, host: str, port: int) -> Iterator[Endpoint]:
    """A server of the model within the block, ready to answer.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, an adapter's folder, or one that was exported as merged.
        workspace: the workspace of the run, for the registry and the recorded base.
        base: the base's folder, where it is not the recorded one.
        host: the address to listen at.
        port: the port to listen at.

    Raises:
        ModelError: there is no such model, it has a trained head, the port is taken, or the server ended.
        KasaError: the adapter or its base is not what it should be.
    """
    _check_port(host, port)
    _check_packages()
    with (
        tempfile.TemporaryDirectory(prefix="kasa-serve-") as temporary,
        stopping.otherwise(partial(shutil.rmtree, temporary, ignore_errors=True)),
    ):
        scratch = Path(temporary)
        folder, precision = _merged(model, workspace, base, scratch / "merged")
        name = _served_name(model)
        _write_cache(scratch / "hub", name, folder)
        process, log = _start(name, scratch, host, port, precision)
        try:
            address = _address(host, port)
            _wait_until_ready(process, log, _address(_EVERYWHERE.get(host, host), port))
            yield Endpoint(address, name, chat_request(folder, name, address), process, log)
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _check_port(host: str, port: int) -> None:
    """The server binds it only after it has loaded the model, minutes later perhaps."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ModelError(
                f"{host}:{port} cannot be listened at ({error}); choose another --port or --host"
            ) from None


def _check_packages() -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ModelError("the server's packages are missing; pip install 'transformers[serving]'")


def _merged(model: str, workspace: Path, base: Path | None, out: Path) -> tuple[Path, str]:
    """(a Hugging Face folder of the model, the precision in which `kasa generate` runs it)."""
    if is_merged(model):
        if base:
            raise ModelError(f"{model} is merged and needs no base; leave out --base")
        return user_path(model).resolve(), fast_precision(torch.cuda.is_available())
    folder = user_path(model)
    if not model.startswith(SCHEME) and is_adapter(folder) and not (folder / ADAPTER_JSON).exists():
        precision = fast_precision(torch.cuda.is_available())
        _merge_other(model, workspace, base, out, precision)
        return out, precision
    with model_source(model, workspace, base, needs_base=True) as source:
        _check_generates(model, source.folder)
        assert source.base is not None
        console.print(f"merging {model} into {source.base_name}", markup=False, soft_wrap=True)
        merge(source.adapter, source.base, out, DTYPES[source.precision], source.beside(merged=True))
        return out, source.precision


def _merge_other(model: str, workspace: Path, base: Path | None, out: Path, precision: str) -> None:
    """Write the base with the adapter of another method merged into it: the sum is formed in fp32 and rounded once."""
    with located_adapter(model, workspace) as (folder, _):
        _check_generates(model, folder)
        base = base_of(folder, workspace, base)
        console.print(f"merging {model} into {base}", markup=False, soft_wrap=True)
        merged = merge_other(load_base(base, "fp32"), folder)
        merged.to(DTYPES[precision]).save_pretrained(out)
        load_tokenizer(base).save_pretrained(out)
        for name, text in beside_weights(folder, base, merged=True).items():
            (out / name).write_text(text, encoding="utf-8")


def _check_generates(model: str, folder: Path) -> None:
    if Head.load(folder).is_new:
        raise ModelError(f"{model} labels texts and generates none; `mlflow models serve` serves it")
    Prompting.load(folder)  # without it `kasa generate` refuses the folder too


def _served_name(model: str) -> str:
    """The registered name, or the folder's, as far as a repository of the hub may be called so."""
    named = (
        re.split("[/@]", model.removeprefix(SCHEME))[0] if model.startswith(SCHEME) else user_path(model).resolve().name
    )
    return re.sub(r"[^\w.-]+|--+|\.\.+", "-", named)[:_LONGEST_NAME].strip("-.") or "model"


def _write_cache(cache: Path, name: str, folder: Path) -> None:
    repository = cache / f"models--{name}"
    snapshot = repository / "snapshots" / _REVISION
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_REVISION, encoding="utf-8")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)


def _start(name: str, scratch: Path, host: str, port: int, precision: str) -> tuple[subprocess.Popen[bytes], Path]:
    """(the server's process, the file of what it says)."""
    command = [sys.executable, "-P", "-m", "transformers.cli.transformers", "serve", name]
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    # A folder of the model's name, where the server runs, would be taken for the model.
    nowhere, log = scratch / "nowhere", scratch / "server.log"
    nowhere.mkdir()
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, "--host", host, "--port", str(port), "--dtype", dtype],
            cwd=nowhere,
            env=os.environ | {"HF_HUB_CACHE": str(scratch / "hub")} | offline,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    return process, log


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, address: str) -> None:
    console.print("loading it")
    began = said = time.monotonic()
    while process.poll() is None:
        try:
            with _direct.open(f"{address}/health", timeout=_ANSWER_S):
                return
        except OSError:
            stopping.pause(_POLL_S)
        if (now := time.monotonic()) - said > PLAIN_INTERVAL_S:
            console.print(f"still loading it after {now - began:.0f} s")
            said = now
    raise _ended(process, log)


def _ended(process: subprocess.Popen[bytes], log: Path) -> ModelError:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    # Of a traceback what stands below its frames, which are indented.
    message = list(takewhile(lambda line: not line[0].isspace(), reversed(lines)))[:_LAST_LINES] or lines[-1:]
    last = " | ".join(line.strip() for line in reversed(message))
    return ModelError(f"the server ended with {process.returncode}: {last or 'it said nothing'}")
