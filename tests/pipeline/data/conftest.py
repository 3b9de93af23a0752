"""A tiny tokenizer, trained here, with and without a chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.config.settings import DataSettings
from pipeline.data.sources import DataSources, SourceFile

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = ["the sentence: good bad film answer", "user assistant system\n", "question one two three four five"] * 20


def build_tokenizer(chat_template: str | None) -> Any:
    """A byte-level BPE: it merges across word boundaries like the real ones, and decodes without loss."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|start|>", "<|end|>", "<|bos|>"]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|bos|>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    return build_tokenizer(None)


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    return build_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings() -> Callable[..., DataSettings]:
    """Data settings with a source that is never read."""
    return lambda **values: DataSettings(**({"train": "data.jsonl"} | values))


def sources_of(train: Path, heldout: Path | None = None, calibration: Path | None = None) -> DataSources:
    """Sources of one file a side."""

    def side(path: Path | None) -> tuple[SourceFile, ...]:
        return () if path is None else (SourceFile(path, hashlib.sha256(path.read_bytes()).hexdigest()),)

    return DataSources(side(train), side(heldout), side(calibration))
