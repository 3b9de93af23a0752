"""Where the base model lies and what it is made of, found without torch: a retraining with nothing to do must be quick."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kasa.file_digest import file_digest
from pipeline.artifacts.store import content_digest
from pipeline.base.embedded import PREFIX, embedded_base, embedded_path_if_present
from pipeline.errors import BaseModelError
from pipeline.settings import BaseSettings

# Everything that decides what the model computes and how text becomes tokens.
_CONTENT = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
)


def find_folder(settings: BaseSettings, workspace: Path, fetch: bool = True) -> Path | None:
    """The base model's Hugging Face folder; arguments, answer and errors as for `pipeline.base.model.find_base`."""
    folder = _place(settings, workspace, fetch)
    if folder is None:
        return None
    _check_folder(folder, settings.model)
    return folder.resolve()


def folder_digest(folder: Path, digest: Callable[[Path], str] = file_digest) -> str:
    """SHA-256 over the content of the model's files, independent of where they lie; `digest` gives that of one file."""
    files = sorted({file for pattern in _CONTENT for file in folder.glob(pattern)})
    return content_digest({file.name: digest(file) for file in files})


def _place(settings: BaseSettings, workspace: Path, fetch: bool) -> Path | None:
    if settings.model.startswith(PREFIX):
        name = settings.model.removeprefix(PREFIX)
        return embedded_base(name, workspace) if fetch else embedded_path_if_present(name, workspace)
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or settings.model.startswith((".", "~")) or settings.model.count("/") != 1:
        raise BaseModelError(f"base.model {settings.model} is neither a folder nor a hub id (ORGANISATION/NAME)")
    return _from_hub(settings, fetch)


def _from_hub(settings: BaseSettings, fetch: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    patterns = [*_CONTENT, "*.index.json"]
    try:
        return Path(
            snapshot_download(
                settings.model, revision=settings.revision, allow_patterns=patterns, local_files_only=not fetch
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        if not fetch:
            return None
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"base.model {settings.model} cannot be fetched from the hub ({type(error).__name__}: {reason}); "
            "without a network, name a local folder"
        ) from error


def _check_folder(folder: Path, name: str) -> None:
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            f"base.model {name}: {folder} has no config.json; it is no Hugging Face model folder"
        ) from None
    except ValueError as error:
        raise BaseModelError(f"base.model {name}: {folder / 'config.json'} is damaged: {error}") from None
    if not list(folder.glob("*.safetensors")):
        raise BaseModelError(f"base.model {name}: {folder} has no .safetensors weights; convert the checkpoint first")
