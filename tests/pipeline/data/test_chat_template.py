"""The exported chat template renders messages to the tokens from which `kasa generate` answers and training learned."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.models.chat_template import chat_template
from pipeline.models.prompting import Message, Prompting

from .conftest import CHAT_TEMPLATE, build_tokenizer

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


def surrounded(tokenizer: Any, single: str) -> Any:
    """The tokenizer with special tokens around each text."""
    names = (tokenizer.bos_token, tokenizer.eos_token)
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def pieces(pre_tokenizer: Any, normalizer: Any = None) -> Any:
    """A tokenizer in SentencePiece's manner: words begin with a mark in the place of their space, as does the text."""
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", "\u2581", "\n", *letters])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizer
    core.decoder = decoders.Metaspace()
    return surrounded(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>"), "<s> $A")


def legacy() -> Any:
    return normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


TOKENIZERS = {
    "bos": lambda: surrounded(build_tokenizer(CHAT_TEMPLATE), "<|bos|> $A"),
    "bos and eos": lambda: surrounded(build_tokenizer(CHAT_TEMPLATE), "<|bos|> $A <|end|>"),
    "marked first": lambda: pieces(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "marked always": lambda: pieces(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "marked by its normalizer": lambda: pieces(None, legacy()),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["the film ", " the film", "\nthe film", "<s>the film", "<|bos|>the film"])
def test_what_a_tokenizer_puts_before_a_text_is_put_there(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    talks = [[USER, ANSWER, USER], [USER._replace(content=text)]]
    for talk in talks:
        for prompting in (Prompting(), Prompting("{prompt}\n")):
            assert rendered(prompting, tokenizer, talk) == prompting.conversation_ids(tokenizer, talk)
    prompting = Prompting()
    wanted = prompting.encode(tokenizer, [talks[1][0], ANSWER]).input_ids
    assert rendered(prompting, tokenizer, [talks[1][0], ANSWER], generation=False) == wanted


@pytest.mark.parametrize("form", FORMS)
def test_contents_in_parts_and_developers(chat_tokenizer: Any, form: str) -> None:
    prompting, template = FORMS[form], chat_template(FORMS[form], chat_tokenizer)

    def ids(messages: list[dict[str, Any]]) -> list[int]:
        return list(
            chat_tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)[
                "input_ids"
            ]
        )

    plain = [SYSTEM, Message("user", "one\ntwo")]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    if prompting != Prompting(chat_template=True):  # there it is the base's own template, as it is
        said = ids([{"role": "developer", "content": SYSTEM.content}, {"role": "user", "content": parts}])
        assert said == prompting.conversation_ids(chat_tokenizer, plain)
        with pytest.raises(Exception, match="this model reads text alone"):
            ids([{"role": "user", "content": [{"type": "image", "image": "a"}]}])
    if not prompting.chat_template:
        with pytest.raises(Exception, match="this model knows no role tool"):
            ids([{"role": "tool", "content": "4"}])
