"""What a row of data becomes: a sample, or a rejection with its reason.

A sample is a conversation before any template. Everything after the forms (split, prompting, tokens, labels) works on samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.models.heads import PAIR_SEPARATOR
from pipeline.models.prompting import Message


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
    """

    turns: tuple[Message, ...]
    location: str
    further: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

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
        return (self.turns[-1].content, *self.further) if len(self.turns) > 1 else ()

    @property
    def is_pair(self) -> bool:
        """Whether this is a pair of texts with a label."""
        return len(self.turns) == 3 and self.turns[1].role == "pair"

    @property
    def opening(self) -> str:
        """What training and held-out samples must not share: all up to the first answer, or the whole of a plain text."""
        first = next(index for index, turn in enumerate(self.turns) if turn.role == "assistant")
        return "\n".join(turn.content for turn in self.turns[: first or 1])
