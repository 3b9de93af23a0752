"""What is learned is the answer and its end; what generation starts from is what training put before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError, ModelError
from pipeline.models.prompting import IGNORED, Message, Prompting, TemplateError

from .conftest import CHAT_TEMPLATE, build_tokenizer

Make = Callable[..., DataSettings]
PROMPTS = ["good film", "the sentence:", "the sentence: ", "line\n", "x" * 50, "café ☕", "ends in a s"]
ANSWERS = ["good", " bad film", "\nanswer", "sentence", "ﬁn ☕", "entence: good"]


def learned(tokenizer: Any, labels: list[int]) -> str:
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_generation_starts_from_what_training_saw(
    plain_tokenizer: Any, chat_tokenizer: Any, chat: bool, prompt: str, answer: str
) -> None:
    tokenizer = chat_tokenizer if chat else plain_tokenizer
    prompting = Prompting("Q: {prompt}", chat, "the system" if chat else None)
    encoded = prompting.encode(tokenizer, [Message("user", prompting.wrap(prompt)), Message("assistant", answer)])
    start = prompting.prompt_ids(tokenizer, prompt)
    if not chat and prompt.endswith(" "):  # a space belongs to the word behind it
        prompt, answer = prompt[:-1], f" {answer}"
    assert encoded.input_ids[: encoded.prompt_tokens] == start
    assert encoded.labels == [IGNORED] * len(start) + encoded.input_ids[len(start) :]
    assert learned(tokenizer, encoded.labels) == f"{answer}<|end|>"
    assert encoded.input_ids == start + prompting.answer_ids(tokenizer, prompt, answer)
    assert f"Q: {prompt}" in tokenizer.decode(start)
    assert ("the system" in tokenizer.decode(start)) == chat


def test_a_space_before_the_answer_is_joined_to_its_first_word(plain_tokenizer: Any) -> None:
    turns = [Message("user", "the film: "), Message("assistant", "good")]
    encoded = Prompting().encode(plain_tokenizer, turns)
    assert encoded.input_ids == [*plain_tokenizer("the film: good")["input_ids"], plain_tokenizer.eos_token_id]
    assert plain_tokenizer.decode(encoded.input_ids[: encoded.prompt_tokens]) == "the film:"


def test_a_prompt_that_merges_with_its_answer_is_split_where_generation_starts(plain_tokenizer: Any) -> None:
    whole = plain_tokenizer("the sentence")["input_ids"]
    start = plain_tokenizer("the s")["input_ids"]
    assert whole[: len(start)] != start, "the fixture no longer merges across this boundary"
    encoded = Prompting().encode(plain_tokenizer, [Message("user", "the s"), Message("assistant", "entence")])
    assert encoded.input_ids[: len(start)] == start


def test_every_assistant_turn_is_learned_with_its_end(chat_tokenizer: Any) -> None:
    turns = [
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
        Message("assistant", "four"),
    ]
    encoded = Prompting(chat_template=True).encode(chat_tokenizer, turns)
    assert learned(chat_tokenizer, encoded.labels) == "two<|end|>four<|end|>"
    assert chat_tokenizer.decode(encoded.input_ids) == (
        "<|start|>user\none<|end|>\n<|start|>assistant\ntwo<|end|>\n<|start|>user\nthree<|end|>\n<|start|>assistant\nfour<|end|>"
    )
    assert chat_tokenizer.decode(encoded.input_ids[encoded.prompt_tokens :]) == "four<|end|>"


def test_the_system_prompt_yields_to_a_conversations_own(chat_tokenizer: Any) -> None:
    turns = [Message("system", "own"), Message("user", "one"), Message("assistant", "two")]
    encoded = Prompting(chat_template=True, system_prompt="theirs").encode(chat_tokenizer, turns)
    text = chat_tokenizer.decode(encoded.input_ids)
    assert "own" in text
    assert "theirs" not in text


def test_eos_is_added_where_the_template_ends_turns_otherwise() -> None:
    tokenizer = build_tokenizer(CHAT_TEMPLATE.replace("<|end|>\n", "<|bos|>"))
    encoded = Prompting(chat_template=True).encode(tokenizer, [Message("user", "one"), Message("assistant", "two")])
    assert learned(tokenizer, encoded.labels) == "two<|bos|><|end|>"


def test_plain_text_is_learned_whole(chat_tokenizer: Any) -> None:
    encoded = Prompting().encode(chat_tokenizer, [Message("assistant", "good film")])
    assert encoded.labels == encoded.input_ids
    assert encoded.prompt_tokens == 0
    assert chat_tokenizer.decode(encoded.input_ids) == "good film<|end|>"


def test_a_template_that_rewrites_history_is_an_error() -> None:
    # As reasoning models do: an earlier answer is shortened once the conversation goes on.
    template = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] if loop.last else 'short' }}")
    turns = [Message("user", "one"), Message("assistant", "two")] * 2
    with pytest.raises(DataError, match="rewrites earlier turns"):
        Prompting(chat_template=True).encode(build_tokenizer(template), turns)


def test_a_refusal_of_the_template_is_told_apart() -> None:
    tokenizer = build_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(TemplateError, match="no system role"):
        Prompting(chat_template=True).encode(tokenizer, [Message("user", "one"), Message("assistant", "two")])


def test_the_tokenizer_decides_about_the_chat_template(
    settings: Make, plain_tokenizer: Any, chat_tokenizer: Any
) -> None:
    assert Prompting.from_settings(settings(), chat_tokenizer).chat_template
    assert not Prompting.from_settings(settings(), plain_tokenizer).chat_template
    assert not Prompting.from_settings(settings(chat_template=False), chat_tokenizer).chat_template
    assert not Prompting.from_settings(settings(), chat_tokenizer, "completion").chat_template


@pytest.mark.parametrize(
    ("values", "form", "message"),
    [
        ({"chat_template": True}, "auto", "has no chat template"),
        ({"system_prompt": "s"}, "auto", "needs a chat template"),
        ({}, "chat", "needs a tokenizer with a chat template"),
        ({"prompt_template": "Q {prompt}"}, "completion", "has no place in data of form completion"),
    ],
)
def test_contradictions_are_errors(
    settings: Make, plain_tokenizer: Any, values: dict[str, Any], form: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Prompting.from_settings(settings(**values), plain_tokenizer, form)


def test_a_prompt_template_does_not_go_with_chat_data(settings: Make, chat_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="has no place in data of form chat"):
        Prompting.from_settings(settings(prompt_template="Q {prompt}"), chat_tokenizer, "chat")


def test_it_is_saved_beside_the_adapter(tmp_path: Path) -> None:
    prompting = Prompting("Frage: {prompt} ü", True, "s")
    prompting.save(tmp_path)
    assert Prompting.load(tmp_path) == prompting
    tmp_path.joinpath("prompting.json").write_text('{"other": 1}')
    with pytest.raises(ModelError, match="damaged"):
        Prompting.load(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        Prompting.load(tmp_path / "elsewhere")
