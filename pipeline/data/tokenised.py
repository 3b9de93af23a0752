"""Samples as token ids: what a language model learns of them, or what a new head reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.data.labels import Labels
from pipeline.data.prepared import Rejection, Sample
from pipeline.models.chat import IGNORED, Encoded, Message, TemplateError, Tokenizer, learning
from pipeline.models.prompting import Prompting, encode_texts


@dataclass(frozen=True)
class Tokenised:
    """A tokenised sample.

    Attributes:
        sample: The sample that was tokenised.
        input_ids: Its token ids.
        labels: For a language model: the ids to be learned, and -100 elsewhere. Empty for a new head.
        prompt_tokens: For a language model: how many ids lie before the answer.
        token_type_ids: For a new head: which text of a pair each token belongs to, if the tokenizer says so.
        label: For a new head: the number of the class, or the value.
    """

    sample: Sample
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    prompt_tokens: int = 0
    token_type_ids: npt.NDArray[np.int32] | None = None
    label: float = 0.0

    @property
    def turns(self) -> tuple[Message, ...]:
        """The turns of its conversation."""
        return self.sample.turns

    @property
    def opening(self) -> str:
        """The text that must not occur in both splits."""
        return self.sample.opening


def tokenise_text(
    prompting: Prompting, sample: Sample, tokenizer: Tokenizer, max_tokens: int
) -> list[Tokenised] | Rejection:
    """The sequences of a sample: one, or several where the chat template rewrites earlier turns."""
    sample = sample.without_end(tokenizer.eos_token)
    if not sample.turns[-1].content.strip() and not sample.turns[-1].tool_calls:
        return Rejection(sample.location, "the answer is nothing but the end-of-sequence token")
    turns = prompting.wrapped(sample.turns)
    try:
        sequences = prompting.encode_sequences(tokenizer, turns)
        # Evaluation scores every choice after the prompt, so all of them have to fit.
        others = [
            prompting.encode(tokenizer, [*turns[:-1], Message("assistant", choice)])
            for choice in sample.choices
            if choice != turns[-1].content
        ]
    except TemplateError as error:
        return Rejection(sample.location, str(error))
    if max(len(each.input_ids) for each in (*(encoded for _, encoded in sequences), *others)) > max_tokens:
        return Rejection(sample.location, f"longer than data.max_tokens ({max_tokens})")
    # The first token is predicted by nothing.
    if all(label == IGNORED for _, encoded in sequences for label in encoded.labels[1:]):
        return Rejection(sample.location, "no token of it can be learned")
    return [_tokenised(tokenizer, sample, learned, encoded) for learned, encoded in sequences]


def _tokenised(tokenizer: Tokenizer, sample: Sample, learned: list[int], encoded: Encoded) -> Tokenised:
    """One sequence of a sample, which has the choices if it holds the last answer."""
    if learned[-1] + 1 < len(sample.turns):
        sample = replace(sample, choices=(), labels=())
    sample = replace(sample, turns=learning(sample.turns, learned))
    ids, labels, prompt_tokens = encoded
    if sample.turns[-1].tool_calls:
        sample = replace(sample, written=tokenizer.decode(ids[prompt_tokens:], skip_special_tokens=True).strip())
    return Tokenised(sample, np.array(ids, np.int32), np.array(labels, np.int32), prompt_tokens)


def tokenise_labelled(
    labels: Labels, sample: Sample, tokenizer: Tokenizer, max_tokens: int
) -> list[Tokenised] | Rejection:
    """The one sequence of a labelled sample, for a new head."""
    read = labels.read(sample)
    if isinstance(read, Rejection):
        return read
    encoded = encode_texts(tokenizer, [turn.content for turn in sample.turns[:-1]])
    ids, types = (np.array(encoded.get(name, ()), np.int32) for name in ("input_ids", "token_type_ids"))
    if len(ids) > max_tokens:
        return Rejection(sample.location, f"longer than data.max_tokens ({max_tokens})")
    if not len(ids):
        return Rejection(sample.location, "the tokenizer has no token for the text")
    sample, label = read
    return [Tokenised(sample, ids, ids[:0], token_type_ids=types, label=label)]
