"""The exported chat template renders messages to the tokens from which `kasa generate` answers and training learned."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.models.chat_template import chat_template
from pipeline.models.prompting import Message, Prompting

USER, ANSWER, SYSTEM = Message("user", "the film "), Message("assistant", "good"), Message("system", 'be "brief"')
TALKS = {
    "single": [USER],
    "several": [USER, ANSWER, Message("user", "{{ bad }} {prompt} ?  ")],
    "system": [SYSTEM, USER],
    "spelled": [Message("user", "<|bos|>one\\n two")],
}
FORMS = {
    "plain": Prompting(),
    "wrapped": Prompting('Q \U0001f600 {% x %} "\\": {prompt}\nA: '),
    "twice": Prompting("{prompt} or {prompt}? "),
    "chat": Prompting(chat_template=True),
    "chat, wrapped": Prompting("film: {prompt}\n\tgood? ", chat_template=True),
    "chat, system": Prompting("{prompt}", chat_template=True, system_prompt="you {{ answer }} 'so'"),
}


def rendered(prompting: Prompting, tokenizer: Any, talk: list[Message], generation: bool = True) -> list[int]:
    messages = [{"role": turn.role, "content": turn.content} for turn in talk]
    ids = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(prompting, tokenizer), add_generation_prompt=generation
    )
    return list(ids["input_ids"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("talk", TALKS)
def test_messages_become_the_tokens_that_generation_starts_from(chat_tokenizer: Any, form: str, talk: str) -> None:
    prompting = FORMS[form]
    wanted = prompting.conversation_ids(chat_tokenizer, TALKS[talk])
    assert rendered(prompting, chat_tokenizer, TALKS[talk]) == wanted


def test_an_answer_at_the_end_is_that_of_the_training(plain_tokenizer: Any) -> None:
    prompting = Prompting("Q: {prompt}\nA: ")
    talk = [Message("user", "the film"), ANSWER]
    wanted = prompting.encode(plain_tokenizer, prompting.wrapped(talk)).input_ids
    assert rendered(prompting, plain_tokenizer, talk, generation=False) == wanted
