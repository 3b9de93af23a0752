"""What is learned is the answer and its end; what generation starts from is what training put before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError, ModelError
from pipeline.models.chat import IGNORED, Message, TemplateError
from pipeline.models.prompting import Prompting

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


def test_a_template_that_rewrites_history_gives_a_sequence_for_each_answer() -> None:
    # As reasoning models do: an earlier answer is shortened once the conversation goes on.
    tokenizer = build_tokenizer(
        CHAT_TEMPLATE.replace(
            "{{ message['content'] }}",
            "{{ 'short' if message['role'] == 'assistant' and not loop.last else message['content'] }}",
        )
    )
    turns = [
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
        Message("assistant", "four"),
    ]
    prompting = Prompting(chat_template=True, system_prompt="brief")
    sequences = prompting.encode_sequences(tokenizer, turns)
    assert [places for places, _ in sequences] == [[1], [3]]
    assert [learned(tokenizer, encoded.labels) for _, encoded in sequences] == ["two<|end|>", "four<|end|>"]
    assert prompting.encode(tokenizer, turns) == sequences[-1][1]
    for places, encoded in sequences:
        start = prompting.conversation_ids(tokenizer, turns[: places[-1]])
        assert encoded.input_ids[: encoded.prompt_tokens] == start


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
        ("{{ 1 / 0 }}", "refuses the conversation: ZeroDivisionError: division by zero"),
        ("{{ 1 + messages[0]['content'] }}", "refuses the conversation: TypeError: "),
        ("{{ messages[0]['content']['text'] + 1 }}", "refuses the conversation: "),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "refuses the conversation: RecursionError: "),
        ("{% if %}", "refuses the conversation: "),
        # What asks for an answer is no part of the conversation.
        (
            CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\nSure: {% endif"),
            "writes 'Sure: ', with which this answer does not begin",
        ),
        # The answer is left out.
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "leaves out the answer"),
    ],
)
def test_what_a_template_refuses_or_hides_concerns_one_row(template: str, message: str) -> None:
    turns = [Message("system", "be brief"), *[Message("user", "one"), Message("assistant", "two")] * 2]
    with pytest.raises(TemplateError, match=message):
        Prompting(chat_template=True).encode(build_tokenizer(template), turns)


def test_an_answer_of_weight_0_is_context(chat_tokenizer: Any) -> None:
    turns = [
        Message("user", "2+2?"),
        Message("assistant", "5", learned=False),
        Message("user", "Sure?"),
        Message("assistant", "4"),
    ]
    encoded = Prompting(chat_template=True).encode(chat_tokenizer, turns)
    assert learned(chat_tokenizer, encoded.labels) == "4<|end|>"
    both = Prompting(chat_template=True).encode(chat_tokenizer, [turn._replace(learned=True) for turn in turns])
    assert encoded.input_ids == both.input_ids


def test_without_a_chat_template_turns_are_paragraphs_of_the_prompt(plain_tokenizer: Any) -> None:
    turns = [
        Message("system", "the film"),
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
    ]
    prompting = Prompting("Q: {prompt}\n")
    encoded = prompting.encode(plain_tokenizer, [*prompting.wrapped(turns), Message("assistant", "four")])
    start = prompting.conversation_ids(plain_tokenizer, turns)
    assert plain_tokenizer.decode(start) == "the film\n\nQ: one\n\n\ntwo\n\nQ: three\n"
    assert encoded.input_ids[: encoded.prompt_tokens] == start
    assert learned(plain_tokenizer, encoded.labels) == "four<|end|>"


def _starts_with_bos(template: str | None) -> Any:
    """A tokenizer that puts BOS before every text, as LLaMA's do."""
    tokenizer = build_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_a_bos_that_the_data_spells_out_is_not_doubled() -> None:
    tokenizer = _starts_with_bos(None)
    pair = [Message("user", "the film "), Message("assistant", "good")]
    spelled = [pair[0]._replace(content="<|bos|>the film "), pair[1]]
    assert Prompting().encode(tokenizer, spelled) == Prompting().encode(tokenizer, pair)
    assert Prompting().prompt_ids(tokenizer, "<|bos|>good") == Prompting().prompt_ids(tokenizer, "good")
    assert (
        Prompting().encode(tokenizer, [Message("assistant", "<|bos|>good")]).input_ids.count(tokenizer.bos_token_id)
        == 1
    )
    with pytest.raises(TemplateError, match=r"a turn begins with '<\|bos\|>'"):
        Prompting(chat_template=True).encode(_starts_with_bos(CHAT_TEMPLATE), spelled)


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
        ({}, "chat", "needs a chat template, and the tokenizer has none"),
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


def test_chat_data_goes_without_a_chat_template_where_the_recipe_says_so(
    settings: Make, plain_tokenizer: Any, chat_tokenizer: Any
) -> None:
    for tokenizer in (plain_tokenizer, chat_tokenizer):
        data = settings(chat_template=False, prompt_template="Q {prompt}")
        assert Prompting.from_settings(data, tokenizer, "chat") == Prompting("Q {prompt}")


def test_it_is_saved_beside_the_adapter(tmp_path: Path) -> None:
    prompting = Prompting("Frage: {prompt} ü", True, "s")
    prompting.save(tmp_path)
    assert Prompting.load(tmp_path) == prompting
    tmp_path.joinpath("prompting.json").write_text('{"other": 1}')
    with pytest.raises(ModelError, match="damaged"):
        Prompting.load(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        Prompting.load(tmp_path / "elsewhere")
