"""The base model: its folder, the digest of its content, and its outline (the modules that can carry an adapter).

Nothing here loads weights. An outline is drawn from an empty model, which needs torch and transformers, and then stored by
the digest of the base. So a run that finds everything made, or a retraining with nothing to do, imports neither.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa.errors import nearest
from kasa.files import file_digest
from kasa.targets import Outline, Target, select_targets
from pipeline.config.settings import BaseSettings, HeadKind
from pipeline.core.code import code_digests, package_versions
from pipeline.core.errors import BaseModelError, one_line
from pipeline.core.files import atomic_write, content_digest, user_path
from pipeline.models.embedded import PREFIX, embedded_base, embedded_path_if_present

if TYPE_CHECKING:
    from kasa import CheckpointWeights

# The module that draws an outline: a change of its code makes the stored outlines stale.
_CODE = ("pipeline.models.shapes",)
# Models that number positions from behind the padding token.
_COUNTING_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
# The files that decide what the model computes and how text becomes tokens.
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


@dataclass(frozen=True)
class BaseModel:
    """A base model on local or shared storage.

    Attributes:
        name: Its name in the recipe.
        folder: Its Hugging Face folder.
        head: The kind of head that it gets.
        outlines: The folder in which outlines are stored; None to store none.
    """

    name: str
    folder: Path
    head: HeadKind = "language-model"
    outlines: Path | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content of its files, wherever they lie."""
        return folder_digest(self.folder)

    @cached_property
    def config(self) -> Any:
        """Its transformers configuration."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder, local_files_only=True)

    @property
    def context_tokens(self) -> int:
        """The length of the longest sequence that it was made for."""
        config = self.config
        positions = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 2**20)
        return positions - config.pad_token_id - 1 if config.model_type in _COUNTING_FROM_PADDING else positions

    def targets(self, wanted: str | Sequence[str]) -> list[Target]:
        """The modules that carry an adapter, found without loading weights.

        Raises:
            TargetError: `wanted` matches nothing.
        """
        return select_targets(self._outline, wanted)

    @cached_property
    def _outline(self) -> Outline:
        def draw() -> Outline:
            from pipeline.models.shapes import base_outline, meta_model  # torch and transformers

            return base_outline(meta_model(self.config, self.head), self.head)

        return draw() if self.outlines is None else remembered_outline(self.outlines, self.digest, self.head, draw)

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
    return BaseModel(settings.model, folder, settings.head, workspace / "outlines" if fetch else None)


def find_folder(settings: BaseSettings, workspace: Path, fetch: bool = True) -> Path | None:
    """The Hugging Face folder of the base model. Arguments and errors are those of `find_base`, and so is None."""
    folder = _find(settings, workspace, fetch)
    if folder is None:
        return None
    _check_folder(folder, settings.model)
    return folder.resolve()


def folder_digest(folder: Path, digest: Callable[[Path], str] = file_digest) -> str:
    """SHA-256 over the content of a model's files, wherever they lie. `digest` gives that of one file."""
    files = sorted({file for pattern in _CONTENT for file in folder.glob(pattern)})
    return content_digest({file.name: digest(file) for file in files})


def remembered_outline(folder: Path, base_digest: str, head: HeadKind, draw: Callable[[], Outline]) -> Outline:
    """The stored outline of this base and head; if there is none for the current code and transformers, that of `draw`."""
    asked = {"base": base_digest, "head": head, **code_digests(_CODE), **package_versions(["transformers"])}
    file = folder / f"{content_digest(asked)[:16]}.json"
    if (known := _read_outline(file)) is not None:
        return known
    outline = draw()
    atomic_write(file, json.dumps(dataclasses.asdict(outline)))
    return outline


def _find(settings: BaseSettings, workspace: Path, fetch: bool) -> Path | None:
    if settings.model.startswith(PREFIX):
        name = settings.model.removeprefix(PREFIX)
        return embedded_base(name, workspace) if fetch else embedded_path_if_present(name, workspace)
    folder = user_path(settings.model)
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or settings.model.startswith((".", "~")) or settings.model.count("/") != 1:
        raise BaseModelError(f"base.model {settings.model} is neither a folder nor a hub id (ORGANISATION/NAME)")
    return _from_hub(settings, fetch)


def _nearest_folder(folder: Path) -> str:
    """A hint at the folders beside, where a name like a hub id was perhaps meant as a path."""
    if not folder.parent.is_dir():
        return ""
    return nearest(str(folder), [str(other) for other in folder.parent.iterdir() if other.is_dir()])


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
    if not list(folder.glob("*.safetensors")):
        raise BaseModelError(f"base.model {name}: {folder} has no .safetensors weights; convert the checkpoint first")


def _read_outline(file: Path) -> Outline | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Outline(tuple(Target(**target) for target in kept["linear"]), kept["others"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
