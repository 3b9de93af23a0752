"""Token ids of texts that are continued: a prompt by its answer, a conversation by its next turn."""

from __future__ import annotations

from typing import Any


def start_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids before an answer. Spaces at the end of the prompt are moved to the answer.

    Tokenizers join a space to the word after it. After a space that is a token of its own, a model has hardly ever seen a
    word begin.
    """
    return ids_with_bos(tokenizer, prompt.rstrip(" "))


def continued_ids(tokenizer: Any, ids: list[int], text: str, longer: str) -> list[int]:
    """The ids of `longer`, which begins with `text`. They begin with `ids`, the ids of `text`.

    If a token spans the boundary ("a" + "b" -> "ab"), the rest is tokenised by itself, because generation could never meet
    such a token there. Otherwise it is not, because some tokenizers put a space before text that stands alone.
    """
    whole = ids_of(tokenizer, longer)
    return whole if whole[: len(ids)] == ids else ids + ids_of(tokenizer, longer[len(text) :])


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without any that the tokenizer puts around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def ids_with_bos(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that stands alone, with BOS once if the tokenizer puts one before it, and nothing after it."""
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers end every text with EOS, after which nothing could follow.
    while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()
    bos = tokenizer.bos_token
    twice = bos and text.startswith(bos) and not text.startswith(bos * 2) and ids[:2] == [tokenizer.bos_token_id] * 2
    return ids[1:] if twice else ids  # the text spells it out, and the tokenizer puts another before it
