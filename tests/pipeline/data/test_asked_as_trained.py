"""A champion is evaluated in the form of prompts that it was trained on, not in that of its challenger."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.evaluation.worker import rewritten
from pipeline.models.prompting import Message, Prompting

NEW, PLAIN, CHAT = Prompting("Question: {prompt}\n"), Prompting(), Prompting("film: {prompt}", chat_template=True)


def sample(prompting: Prompting, tokenizer: Any, *turns: Message) -> dict[str, Any]:
    """As `prepare` stores it."""
    encoded = prompting.encode(tokenizer, prompting.wrapped(turns))._asdict()
    prompt = turns[0].content if len(turns) == 2 else "a transcript"
    return {**encoded, "prompt": prompt, "references": [turns[-1].content] if len(turns) > 1 else []}


@pytest.mark.parametrize("own", [PLAIN, CHAT])
def test_one_prompt_and_its_answer_are_rewritten(chat_tokenizer: Any, own: Prompting) -> None:
    turns = (Message("user", "the film"), Message("assistant", "good"))
    theirs = sample(NEW, chat_tokenizer, *turns)
    found = rewritten(theirs, NEW, own, chat_tokenizer)
    assert found == sample(own, chat_tokenizer, *turns)
    assert found["input_ids"] != theirs["input_ids"]
    assert found["input_ids"][: found["prompt_tokens"]] == own.prompt_ids(chat_tokenizer, "the film")
    assert rewritten(theirs, NEW, NEW, chat_tokenizer) is theirs


def test_plain_text_and_longer_conversations_stay(chat_tokenizer: Any) -> None:
    text = sample(PLAIN, chat_tokenizer, Message("assistant", "the whole sentence"))
    assert rewritten(text, PLAIN, NEW, chat_tokenizer) is text
    turns = [Message(role, "good") for role in ("user", "assistant", "user", "assistant")]
    talk = sample(CHAT, chat_tokenizer, *turns)
    assert rewritten(talk, CHAT, NEW, chat_tokenizer) is talk
