"""Samples, and the prepared dataset as the stages after preparation read it.

A row of data becomes a sample, which is a conversation before any template, or a rejection with its reason. The prepared
dataset is a folder:

train, heldout     Hugging Face datasets on disk (columns: see `COLUMNS` and `LABELLED_COLUMNS`)
validation         another one, if `data.validation_rows` asks for it
calibration        another one, if `data.calibration` names a source
prompting.json     how prompts are written (`pipeline.models.prompting`)
head.json          what the outputs of a new head mean (`pipeline.models.prompting`), if the recipe asks for one
rejected.jsonl     every unusable row with its reason
summary.json       counts; written last
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kasa.errors import DamagedFileError
from kasa.files import read_json
from pipeline.core.errors import WorkspaceError
from pipeline.models.chat import Message
from pipeline.models.prompting import PAIR_SEPARATOR, Head, Prompting

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


COLUMNS = ("input_ids", "labels", "prompt", "prompt_tokens", "references", "choices", "choice_labels", "source")
# `token_type_ids` is empty if the tokenizer gives none.
LABELLED_COLUMNS = ("input_ids", "token_type_ids", "label", "prompt", "references", "source")


class Rejection(NamedTuple):
    """A row that cannot be used.

    Attributes:
        location: file and line.
        reason: worded so that equal defects have equal reasons, and can be counted.
    """

    location: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """A conversation that ends with an assistant turn, before any template. A lone assistant turn is plain text.

    The last turn of a labelled text is its label; the second text of a pair is a turn of the role `pair`.

    Attributes:
        turns: the conversation.
        location: file and line.
        further: references in addition to the last turn.
        choices: the answers to choose from, of which the last turn is one; empty where there is no choice.
        labels: how a generated answer names each choice.
        written: the last turn as the chat template writes it, where it calls tools.
    """

    turns: tuple[Message, ...]
    location: str
    further: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    written: str = ""

    @property
    def prompt(self) -> str:
        """What a user would type to get the last turn; for longer conversations the transcript up to that turn."""
        before = self.turns[:-1]
        if len(before) == 1 and before[0].role == "user":
            return before[0].content
        if self.is_pair:
            return PAIR_SEPARATOR.join(turn.content for turn in before)
        return "\n".join(f"{turn.role}: {turn.content}" for turn in before)

    @property
    def references(self) -> tuple[str, ...]:
        """The last turn, then the further references; empty for plain text, which has no answer to compare with."""
        return (self.written or self.turns[-1].content, *self.further) if len(self.turns) > 1 else ()

    def without_end(self, eos: str) -> Sample:
        """The sample without the end-of-sequence tokens that data may spell out after an answer; each answer gets one anyway."""

        def cut(text: str) -> str:
            while eos and text.rstrip().endswith(eos):
                text = text.rstrip().removesuffix(eos)
            return text

        turns = tuple(
            turn._replace(content=cut(turn.content)) if turn.role == "assistant" else turn for turn in self.turns
        )
        return replace(self, turns=turns, choices=tuple(map(cut, self.choices)), labels=tuple(map(cut, self.labels)))

    @property
    def is_pair(self) -> bool:
        """Whether this is a pair of texts with a label."""
        return len(self.turns) == 3 and self.turns[1].role == "pair"

    @property
    def opening(self) -> str:
        """What training and held-out samples must not share: all up to the first answer, or the whole of a plain text."""
        first = next(index for index, turn in enumerate(self.turns) if turn.role == "assistant")
        return "\n".join(turn.content for turn in self.turns[: first or 1])


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset. Its splits are mapped from disk when they are first used.

    Attributes:
        folder: The folder that `prepare_dataset` wrote.
        summary: The content of `summary.json`.
    """

    folder: Path
    summary: dict[str, Any]

    @cached_property
    def train(self) -> Dataset:
        """The training split."""
        return self._load("train")

    @cached_property
    def heldout(self) -> Dataset:
        """The held-out split."""
        return self._load("heldout")

    @cached_property
    def validation(self) -> Dataset | None:
        """The split on which the loss is measured during training; None if there is none."""
        return self._load("validation") if (self.folder / "validation").exists() else None

    @cached_property
    def calibration(self) -> Dataset:
        """The text that truncation looks at: that of `data.calibration`, or else the training split."""
        return self._load("calibration") if (self.folder / "calibration").exists() else self.train

    @cached_property
    def prompting(self) -> Prompting:
        """How the prompts were written."""
        return Prompting.load(self.folder)

    @cached_property
    def head(self) -> Head:
        """The head that the samples were prepared for."""
        return Head.load(self.folder)

    def _load(self, name: str) -> Dataset:
        from datasets import load_from_disk  # takes a second to import

        try:
            return load_from_disk(str(self.folder / name))
        except (OSError, ValueError) as error:
            raise WorkspaceError(
                f"{self.folder / name} is damaged ({error}); run the same command again, which makes it again"
            ) from None


def load_prepared(folder: Path) -> PreparedDataset:
    """Open a prepared dataset.

    Raises:
        WorkspaceError: The folder is incomplete or damaged.
    """
    try:
        return PreparedDataset(folder, read_json(folder / "summary.json"))
    except (OSError, DamagedFileError) as error:
        raise WorkspaceError(f"{error}; run the same command again, which makes it again") from None


def token_counts(samples: Dataset) -> np.ndarray:
    """The number of tokens of each sample, shape (N,), from Arrow's offsets: no token is read."""
    import numpy as np

    chunks = samples.data.column("input_ids").chunks
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])


def label_counts(samples: Dataset) -> np.ndarray:
    """The number of learned tokens of each sample, shape (N,); the first token is predicted by nothing and never counts."""
    import numpy as np

    counts = []
    for chunk in samples.data.column("labels").chunks:
        offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
        learned = np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy() >= 0)])
        second = np.minimum(offsets[:-1] + 1, offsets[1:])
        counts.append(learned[offsets[1:]] - learned[second])
    return np.concatenate(counts)
