"""The base model: its folder, the digest of its content, and its outline (the modules that can carry an adapter).

Nothing here loads weights. An outline is drawn from the configuration where that says all of it, else from an empty model,
which needs torch and transformers, and then stored by the digest of the base. So a run that finds everything made, or a
retraining with nothing to do, imports neither.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa.errors import DamagedFileError, nearest
from kasa.files import file_digest, read_sealed_json, sealed_json
from kasa.targets import Outline, Target, select_targets
from pipeline.config.settings import BaseSettings, HeadKind
from pipeline.core.code import code_digests, package_versions
from pipeline.core.console import console
from pipeline.core.errors import BaseModelError, one_line
from pipeline.core.files import atomic_write, content_digest, machine_cache, user_path
from pipeline.models.embedded import PREFIX, embedded_base, embedded_path_if_present
from pipeline.models.paper import plain_outline
from pipeline.models.pickled import PICKLES, convert, converted_folder, pickle_files

if TYPE_CHECKING:
    from kasa import CheckpointWeights

# The modules that draw an outline: a change of their code makes the stored outlines stale.
_CODE = ("pipeline.models.loading", "pipeline.models.paper")
# A tokenizer has at least one of these.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spm.model",
    "sentencepiece.bpe.model",
)
# The files that decide what the model computes and how text becomes tokens: the small ones first.
_TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
    "chat_template.json",
    "vocab*",
    "merges*",
    "*.model",  # spm.model, sentencepiece.bpe.model, ...
    "*.spm",
    "*.codes",
    "added_tokens.json",
    "special_tokens_map.json",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_CONTENT = ("*.safetensors", *_TEXTS)
_ANY_LENGTH = 2**20


@dataclass(frozen=True)
class BaseModel:
    """A base model on local or shared storage.

    Attributes:
        name: Its name in the recipe.
        folder: Its Hugging Face folder.
        head: The kind of head that it gets.
        outlines: The folder in which outlines are stored.
    """

    name: str
    folder: Path
    head: HeadKind = "language-model"
    outlines: Path = field(default_factory=lambda: machine_cache() / "outlines")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content of its files, wherever they lie."""
        return self._looked_at[0]

    @property
    def as_found(self) -> dict[str, Any]:
        """Which files they were that the digest was taken of, as JSON values: their `place`, and the state of each.

        The same files at the same place of the same machine are in the same state, unless one was written, replaced or moved.
        """
        states = {name: list(state) for name, state in self._looked_at[1].items()}
        return {"place": f"{platform.node()}:{self.folder}", "states": states}

    def check_unchanged(self) -> None:
        """Make sure that its files are still those of the digest: what was read since then is what the digest stands for.

        Raises:
            BaseModelError: A file was written, replaced or moved since.
        """
        before, now = self._looked_at[1], _file_states(self.folder)
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            raise BaseModelError(
                f"base.model {self.name}: {self.folder / changed[0]} was changed while the run read it, so its result is thrown "
                "away; leave the folder as it is and run the same command again"
            )

    @cached_property
    def _looked_at(self) -> tuple[str, dict[str, tuple[int, ...]]]:
        # The states first: a change during the reading is then seen as one.
        states = _file_states(self.folder)
        return folder_digest(self.folder), states

    @cached_property
    def config(self) -> Any:
        """Its transformers configuration."""
        from pipeline.models.shapes import read_config  # transformers

        return read_config(self.folder)

    @property
    def context_tokens(self) -> int:
        """The length of the longest sequence that it was made for."""
        return self._outline.positions or _ANY_LENGTH

    def targets(self, wanted: str | Sequence[str]) -> list[Target]:
        """The modules that carry an adapter, found without loading weights.

        Raises:
            TargetError: `wanted` matches nothing.
            BaseModelError: The checkpoint does not fit its configuration.
        """
        return select_targets(self._outline, wanted)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What people should know of how it is loaded and adapted, in sentences."""
        return self._outline.remarks

    @property
    def drops(self) -> bool:
        """Whether it drops activations at random in training, as encoders do."""
        return self._outline.drops

    @cached_property
    def _outline(self) -> Outline:
        def draw() -> Outline:
            if (plain := plain_outline(self.folder, self.head)) is not None:
                return plain
            from pipeline.models.loading import draw_outline  # torch and transformers

            return draw_outline(self.folder, self.head)

        return remembered_outline(self.outlines, self.digest, self.head, draw)

    @property
    def weights(self) -> CheckpointWeights:
        """Its stored weights, by name."""
        from kasa import CheckpointWeights

        return CheckpointWeights(self.folder)


def find_base(settings: BaseSettings, workspace: Path, fetch: bool = True) -> BaseModel | None:
    """Find the base model of a recipe. An embedded or hub model is fetched first.

    Args:
        fetch: Whether anything may be fetched or stored.

    Returns:
        The base model; None only if `fetch` is false and the model has not been fetched yet.

    Raises:
        BaseModelError: There is no such model, it cannot be fetched, or it is no safetensors checkpoint.
    """
    folder = find_folder(settings, workspace, fetch)
    if folder is None:
        return None
    return BaseModel(settings.model, folder, settings.head)


def find_folder(settings: BaseSettings, workspace: Path, fetch: bool = True) -> Path | None:
    """The Hugging Face folder of the base model. Arguments and errors are those of `find_base`, and so is None."""
    folder = _find(settings, workspace, fetch)
    if folder is None:
        return None
    _check_folder(folder, settings.model)
    if list(folder.glob("*.safetensors")):
        return folder.resolve()
    return _as_safetensors(folder, settings.model, workspace / "sources", fetch)


def folder_digest(folder: Path, digest: Callable[[Path], str] = file_digest) -> str:
    """SHA-256 over the content of a model's files, wherever they lie. `digest` gives that of one file."""
    return content_digest({file.name: digest(file) for file in _content_files(folder)})


def _content_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in _CONTENT for file in folder.glob(pattern)})


def _file_states(folder: Path) -> dict[str, tuple[int, ...]]:
    """Whatever writes, replaces or moves a file changes its state, even if it is put back."""
    states: dict[str, tuple[int, ...]] = {}
    for file in _content_files(folder):
        found = file.stat()
        states[file.name] = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return states


def remembered_outline(folder: Path, base_digest: str, head: HeadKind, draw: Callable[[], Outline]) -> Outline:
    """The stored outline of this base and head; if there is none for the current code and transformers, that of `draw`."""
    asked = {"base": base_digest, "head": head, **code_digests(_CODE), **package_versions(["transformers"])}
    file = folder / f"{content_digest(asked)[:16]}.json"
    if (known := _read_outline(file)) is not None:
        return known
    outline = draw()
    with suppress(OSError):  # a home that cannot be written is no obstacle
        atomic_write(file, sealed_json(dataclasses.asdict(outline)))
    return outline


def _find(settings: BaseSettings, workspace: Path, fetch: bool) -> Path | None:
    embedded = settings.model.startswith(PREFIX)
    folder = user_path(settings.model)
    if settings.revision is not None and (embedded or folder.is_dir()):
        raise BaseModelError(
            f"base.revision {settings.revision}: base.model {settings.model} is not of the hub and has no revisions; remove base.revision"
        )
    if embedded:
        name = settings.model.removeprefix(PREFIX)
        return embedded_base(name, workspace) if fetch else embedded_path_if_present(name, workspace)
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or settings.model.startswith((".", "~")) or settings.model.count("/") != 1:
        hint = f"; give the folder, {folder.parent}" if folder.is_file() else _nearest_folder(folder)
        raise BaseModelError(f"base.model {settings.model} is neither a folder nor a hub id (ORGANISATION/NAME){hint}")
    return _from_hub(settings, fetch)


def _nearest_folder(folder: Path) -> str:
    """A hint at the folders beside, where a name like a hub id was perhaps meant as a path."""
    if not folder.parent.is_dir():
        return ""
    return nearest(str(folder), [str(other) for other in folder.parent.iterdir() if other.is_dir()])


def _from_hub(settings: BaseSettings, fetch: bool) -> Path | None:
    """The folder in the hub's cache. What is small comes first: a base that cannot be used is refused before its weights."""
    folder = _snapshot(settings, settings.revision, _TEXTS, fetch)
    if folder is None or (not fetch and not _has_weights(folder)):
        return None
    if fetch:
        if not _has_weights(folder):
            _check_usable(folder, settings.model)
        # Of the same revision, even where the hub's has moved on meanwhile.
        _snapshot(settings, folder.name, _WEIGHTS, fetch)
        if not _has_weights(folder):
            _snapshot(settings, folder.name, (PICKLES,), fetch)
    return folder


def _has_weights(folder: Path) -> bool:
    return bool(list(folder.glob("*.safetensors")) or pickle_files(folder))


def _check_usable(folder: Path, name: str) -> None:
    from pipeline.models.prompting import load_tokenizer
    from pipeline.models.shapes import read_config

    _check_folder(folder, name)
    read_config(folder)
    load_tokenizer(folder)


def _snapshot(settings: BaseSettings, revision: str | None, patterns: Sequence[str], fetch: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(settings.model)
    except HFValidationError as error:
        raise BaseModelError(
            f"base.model {settings.model} is no folder here and can be no hub id: {one_line(error)}"
        ) from None
    try:
        return Path(
            snapshot_download(
                settings.model, revision=revision, allow_patterns=list(patterns), local_files_only=not fetch
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        if not fetch:
            return None
        hint = _nearest_folder(user_path(settings.model))
        raise BaseModelError(
            f"base.model {settings.model} is no folder here{hint}{'' if hint else ';'} and as a hub id it cannot be fetched "
            f"({type(error).__name__}: {one_line(error)}); without a network, name a local folder"
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


def check_has_tokenizer(folder: Path, name: str) -> None:
    """Refuse a base whose folder has no file of a tokenizer; to export or merge it needs none.

    Raises:
        BaseModelError: That is so.
    """
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        raise BaseModelError(
            f"base.model {name}: {folder} has no tokenizer ({', '.join(_TOKENIZERS)}); save the base's own there"
        )


def tokenizer_facts(folder: Path) -> tuple[bool, str]:
    """Whether a base's tokenizer has a chat template, and how it writes the end of a text, as far as its files say so."""
    try:
        values = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        end = values.get("eos_token") or ""
        inside = bool(values.get("chat_template"))
    except (OSError, ValueError, AttributeError):
        end, inside = "", False
    beside = any(folder.rglob("*.jinja")) or (folder / "chat_template.json").is_file()
    return inside or beside, str(end.get("content", "") if isinstance(end, dict) else end)


def _as_safetensors(folder: Path, name: str, cache: Path, fetch: bool) -> Path | None:
    if not pickle_files(folder):
        raise BaseModelError(
            f"base.model {name}: {folder} has no weights, neither *.safetensors nor {PICKLES}; other formats have to be "
            "converted first"
        )
    out = converted_folder(folder, cache)
    if out.is_dir():
        return out.resolve()
    if not fetch:
        return None
    console.print(f"base.model {name}: its weights are pickles; storing them as safetensors", soft_wrap=True)
    return convert(folder, out, _content_files(folder)).resolve()


def _read_outline(file: Path) -> Outline | None:
    try:
        kept = read_sealed_json(file)
    except (FileNotFoundError, DamagedFileError):
        return None
    linear = tuple(Target(**target) for target in kept["linear"])
    return Outline(linear, kept["others"], tuple(kept["remarks"]), kept["drops"], kept["positions"])
