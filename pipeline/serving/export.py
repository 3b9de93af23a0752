"""Export of adapters for other programs: a plain LoRA, a merged Hugging Face folder, PEFT's KaSA folder; import of the last.

The method library does the conversions (`kasa.lora_export`, `kasa.merging`, `kasa.peft_kasa`). This module finds adapters and
bases by name, and says what to type next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kasa import KasaError, export_lora, merge, read_adapter, save_adapter
from kasa.adapter_file import ADAPTER_JSON, SavedAdapter, check_base
from kasa.errors import InterchangeError
from kasa.interchange import new_folder
from kasa.lora_export import lora_rank, vllm_rank
from kasa.peft_kasa import export_peft_kasa, import_peft_kasa
from pipeline.config.settings import BaseSettings
from pipeline.core.errors import BaseModelError, ModelError
from pipeline.core.files import machine_cache
from pipeline.core.machine import fast_precision
from pipeline.core.redaction import shell_command
from pipeline.models.base import find_base
from pipeline.models.chat_template import CHAT_TEMPLATE_FILE, chat_files, tokenizer_settings
from pipeline.models.loading import DTYPES
from pipeline.models.prompting import PROMPTING_FILE, Prompting
from pipeline.serving.answer import DEFAULT_NEW_TOKENS, located_adapter
from pipeline.serving.inference import BASE_VARIABLE, is_hub_id
from pipeline.serving.logits import LogitDifference, coarse, logit_difference, too_large

_ADDRESS = "http://localhost:8000"  # vLLM's own default

Format = Literal["lora", "merged", "peft-kasa"]
Dtype = Literal["fp32", "bf16", "stored"]


@dataclass(frozen=True)
class Exported:
    """The result of an export or import.

    Attributes:
        out: the written folder.
        format: its format; `kasa` for an import.
        base: folder of the base; its recorded name, if it is not on this machine.
        size: bytes of all files in `out`.
        rank: of the adapter in `out`; None for a merged model.
        dtypes: storage types of the weights that carry the adapter.
        logits: the merged model against base and adapter, both in fp32; None where they were not compared.
        command: a command that loads `out`; its paths are absolute.
        notes: what the user should know of this export.
        request: a command that asks the server which `command` starts; None where that starts none, or knows no form of chats.
    """

    out: Path
    format: str
    base: str
    size: int
    rank: int | None
    dtypes: tuple[str, ...]
    logits: LogitDifference | None
    command: str
    notes: tuple[str, ...] = ()
    request: str | None = None


@dataclass(frozen=True)
class ModelSource:
    """A KaSA adapter and the base that it belongs to.

    Attributes:
        folder: the adapter's folder.
        adapter: its contents.
        base: folder of the base; None where it is not on this machine.
        base_name: how other programs find the base: its hub id, or a folder.
        precision: in which `kasa generate` runs it.
    """

    folder: Path
    adapter: SavedAdapter
    base: Path | None
    base_name: str
    precision: str

    def beside(self, merged: bool = False) -> dict[str, str]:
        """See `beside_weights`."""
        return beside_weights(self.folder, self.base, merged)


def export(
    model: str, out: Path, format_: Format, workspace: Path, base: Path | None, pad_rank: bool, dtype: Dtype
) -> Exported:
    """Export an adapter folder or a registered model (`models:/NAME@ALIAS`, `models:/NAME/VERSION`).

    Args:
        model: the adapter.
        out: a folder that does not exist yet.
        format_: the format.
        workspace: the workspace of the run, for the registry and the recorded base.
        base: the base's folder, where it is not the recorded one.
        pad_rank: for `lora`: pad with zeros to a rank vLLM accepts.
        dtype: storage type; `stored` is the base's for `merged`, the adapter's fp32 for the others.

    Raises:
        KasaError: the adapter, its base or `out` is not what it should be; nothing is written then.
    """
    if pad_rank and format_ != "lora":
        raise InterchangeError(f"--pad-rank belongs to --format lora; leave it out for {format_}")
    if format_ == "peft-kasa" and dtype == "bf16":
        raise InterchangeError("--format peft-kasa is written in fp32, as it was trained; leave out --dtype bf16")
    with model_source(model, workspace, base, needs_base=format_ == "merged") as source:
        if format_ == "merged":
            return _merged(source, out, dtype)
        if format_ == "lora":
            return _lora(source, out, pad_rank, dtype)
        return _peft_kasa(source, out)


def beside_weights(folder: Path, base: Path | None, merged: bool) -> dict[str, str]:
    """What other programs read beside the weights, by file name: the form of prompts, and where answers end.

    Args:
        folder: the adapter's folder.
        base: the base's; without its tokenizer on this machine it is `prompting.json` alone.
        merged: adds the tokenizer's own copy of the template.
    """
    if not (folder / PROMPTING_FILE).is_file():
        return {}
    texts = {PROMPTING_FILE: (folder / PROMPTING_FILE).read_text(encoding="utf-8")}
    if base is None:
        return texts
    try:
        texts |= chat_files(Prompting.load(folder), base)
    except BaseModelError:  # a base without a tokenizer
        return texts
    return texts | (tokenizer_settings(base, texts[CHAT_TEMPLATE_FILE]) if merged else {})


def import_folder(peft_folder: Path, out: Path, base: Path) -> Exported:
    """Import a KaSA adapter that PEFT saved.

    Args:
        peft_folder: the folder that PEFT wrote.
        out: the adapter folder to write; it does not exist yet.
        base: folder of the base model.

    Raises:
        KasaError: the folder is no plain KaSA adapter, does not fit the base, or `out` exists.
    """
    base = _folder_of(str(base.absolute()), base)
    notes: tuple[str, ...] = ()
    with new_folder(out) as folder:
        adapter = import_peft_kasa(peft_folder, base)
        save_adapter(folder, adapter)
        if (peft_folder / PROMPTING_FILE).is_file():
            Prompting.load(peft_folder).save(folder)
        else:
            Prompting().save(folder)
            notes = (
                f"prompts go to the model as they are; if it was trained with a template, put it into {PROMPTING_FILE}",
            )
    return Exported(
        out=out,
        format="kasa",
        base=str(base),
        size=_size(out),
        rank=adapter.config.rank,
        dtypes=("float32",),
        logits=None,
        command=f'{shell_command("kasa", "generate", out.absolute())} "..."',
        notes=notes,
    )


def _merged(source: ModelSource, out: Path, dtype: Dtype) -> Exported:
    assert source.base is not None
    written = merge(source.adapter, source.base, out, DTYPES.get(dtype), source.beside(merged=True))
    logits, note = None, too_large(written.parameters)
    if note is None:
        logits = logit_difference(source.base, source.adapter, out)
        note = coarse(logits, written.dtypes)
    return Exported(
        out=out,
        format="merged",
        base=source.base_name,
        size=_size(out),
        rank=None,
        dtypes=written.dtypes,
        logits=logits,
        command=shell_command("vllm", "serve", out.absolute()),
        notes=(note,) if note else (),
        request=chat_request(out, str(out.absolute())),
    )


def _lora(source: ModelSource, out: Path, pad_rank: bool, dtype: Dtype) -> Exported:
    needed = lora_rank(source.adapter)
    stored = DTYPES["bf16"] if dtype == "bf16" else DTYPES["fp32"]
    rank = export_lora(
        source.adapter, out, vllm_rank(needed) if pad_rank else None, source.base_name, stored, source.beside()
    )
    served = _serve_lora(source, out.absolute(), rank)
    return Exported(
        out=out,
        format="lora",
        base=source.base_name,
        size=_size(out),
        rank=rank,
        dtypes=(str(stored).removeprefix("torch."),),
        logits=None,
        command=served or _load_with_peft(source, out),
        request=chat_request(out, out.name) if served else None,
    )


def _serve_lora(source: ModelSource, out: Path, rank: int) -> str | None:
    """vLLM's command; None for a LoRA that it does not load."""
    if any(target.transposed for target in source.adapter.targets):
        return None
    try:
        limit = vllm_rank(rank)
    except InterchangeError:
        return None
    options = ["--enable-lora", "--max-lora-rank", limit, "--lora-modules", f"{out.name}={out}"]
    if (template := out / CHAT_TEMPLATE_FILE).is_file():
        # Else vLLM takes the base's template, and the base's settings with its penalties.
        options += ["--chat-template", template, "--generation-config", out]
    return shell_command("vllm", "serve", source.base_name, *options)


def chat_request(out: Path, name: str, address: str = _ADDRESS) -> str | None:
    """A chat request to the model `name` of an OpenAI-compatible server; None where `out` has no chat template."""
    if not (out / CHAT_TEMPLATE_FILE).is_file():
        return None
    messages = [{"role": "user", "content": "..."}]
    body = json.dumps({"model": name, "messages": messages, "temperature": 0, "max_tokens": DEFAULT_NEW_TOKENS})
    return shell_command("curl", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body)


def _peft_kasa(source: ModelSource, out: Path) -> Exported:
    export_peft_kasa(source.adapter, out, source.base_name, source.beside())
    config = source.adapter.config
    notes = ["PEFT recomputes the truncation, by an SVD of every weight, whenever it loads this folder"]
    if config.regulariser == "authors":
        notes.append("trained with the authors' regularisers; in PEFT the same beta and gamma pull much harder")
    return Exported(
        out=out,
        format="peft-kasa",
        base=source.base_name,
        size=_size(out),
        rank=config.rank,
        dtypes=("float32",),
        logits=None,
        command=_load_with_peft(source, out),
        notes=tuple(notes),
    )


def _load_with_peft(source: ModelSource, out: Path) -> str:
    code = (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM; "
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({source.base_name!r}), {str(out.absolute())!r})"
    )
    return shell_command("python", "-c", code)


@contextmanager
def model_source(model: str, workspace: Path, base: Path | None, needs_base: bool) -> Iterator[ModelSource]:
    """A KaSA adapter by its folder or registry URI, with its base where that is on this machine.

    Args:
        model: the adapter.
        workspace: the workspace of the run, for the registry and the recorded base.
        base: the base's folder, where it is not the recorded one.
        needs_base: whether the base is fetched where it is missing.

    Raises:
        KasaError: the adapter or its base is not what it should be.
    """
    with located_adapter(model, workspace) as (folder, config):
        if not (folder / ADAPTER_JSON).exists():
            raise ModelError(f"{model} is no KaSA adapter: there is no {ADAPTER_JSON} beside its weights")
        recorded = Path(config["base_folder"]) if config and "base_folder" in config else None
        precision = config["precision"] if config else fast_precision(torch.cuda.is_available())
        yield _with_base(folder, workspace, base, recorded, needs_base, precision)


def _with_base(
    folder: Path, workspace: Path, base: Path | None, recorded: Path | None, needs_base: bool, precision: str
) -> ModelSource:
    adapter = read_adapter(folder)
    named = os.environ.get(BASE_VARIABLE)
    given = base or (Path(named) if named else None)
    chosen = given or (recorded if recorded and (recorded / "config.json").exists() else None)
    found: Path | None
    if chosen:
        found = _folder_of(str(chosen.absolute()), chosen)
    else:
        found = _base_folder(adapter.base, workspace, fetch=needs_base)
    if found:
        check_base(adapter, found)
    keeps_name = found is None or (given is None and is_hub_id(adapter.base) and not Path(adapter.base).is_dir())
    name = adapter.base if keeps_name or found is None else str(found.absolute())
    return ModelSource(folder, adapter, found, name, precision)


def _folder_of(name: str, given: Path) -> Path:
    if not given.is_dir():
        raise BaseModelError(f"--base {given} is no folder; name the Hugging Face folder of the base model")
    found = find_base(BaseSettings(model=name), machine_cache())
    assert found is not None  # only a look without fetching finds nothing
    return found.folder


def _base_folder(name: str, workspace: Path, fetch: bool) -> Path | None:
    """The base's folder; without `fetch` None where it is not on this machine."""
    try:
        found = find_base(BaseSettings(model=name), workspace, fetch)
    except KasaError:
        if fetch:
            raise
        return None
    return found.folder if found else None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
