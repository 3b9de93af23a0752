"""Under the chat templates of well-known bases, what is learned is what generation has to produce after what it sees."""

from __future__ import annotations

import pytest

from pipeline.models.chat import IGNORED, Message, TemplateError, ToolCall, encode_sequences, render
from pipeline.models.prompting import Prompting
from tests.support.chat_templates import FAMILIES, SMOLLM2, build, marked, tokenizer_of

SYSTEM, ASKED, FOUR = Message("system", "Be brief."), Message("user", "2+2?"), Message("assistant", "4")
SURE, YES = Message("user", "Sure?"), Message("assistant", "Yes.")
SINGLE, MULTI = (ASKED, FOUR), (ASKED, FOUR, SURE, YES)
THOUGHT = Message("assistant", "<think>\nTwo and two.\n</think>\n\n4")


def sequences(name: str, *turns: Message) -> list[str]:
    tokenizer = tokenizer_of(name)
    found = encode_sequences(tokenizer, turns)
    return [marked(tokenizer, encoded.input_ids, encoded.labels) for _, encoded in found]


def llama(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


def chatml(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


LLAMA, CHATML = "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|im_start|>assistant\n"
HELPFUL, QWEN = chatml("system", "Be helpful."), chatml("system", "You are Qwen.")
BRIEF = chatml("system", "Be brief.")
NO_THOUGHT = "<think>\n\n</think>\n\n"
GEMMA = "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n"
R1 = "<|User|>2+2?<|Assistant|><think>\n"
# By family: without and with a system turn, one question and two.
RIGHT = {
    "llama-3": [
        [f"<|begin_of_text|>{llama('user', '2+2?')}{LLAMA}⟦4<|eot_id|>⟧"],
        [f"<|begin_of_text|>{llama('system', 'Be brief.')}{llama('user', '2+2?')}{LLAMA}⟦4<|eot_id|>⟧"],
        [f"<|begin_of_text|>{llama('user', '2+2?')}{LLAMA}⟦4<|eot_id|>⟧{llama('user', 'Sure?')}{LLAMA}⟦Yes.<|eot_id|>⟧"],
        [
            f"<|begin_of_text|>{llama('system', 'Be brief.')}{llama('user', '2+2?')}{LLAMA}⟦4<|eot_id|>⟧"
            f"{llama('user', 'Sure?')}{LLAMA}⟦Yes.<|eot_id|>⟧"
        ],
    ],
    "smollm2": [
        [f"{HELPFUL}{chatml('user', '2+2?')}{CHATML}⟦4<|im_end|>⟧"],
        [f"{BRIEF}{chatml('user', '2+2?')}{CHATML}⟦4<|im_end|>⟧"],
        [f"{HELPFUL}{chatml('user', '2+2?')}{CHATML}⟦4<|im_end|>⟧\n{chatml('user', 'Sure?')}{CHATML}⟦Yes.<|im_end|>⟧"],
        [f"{BRIEF}{chatml('user', '2+2?')}{CHATML}⟦4<|im_end|>⟧\n{chatml('user', 'Sure?')}{CHATML}⟦Yes.<|im_end|>⟧"],
    ],
    "qwen2.5": [
        [f"{QWEN}{chatml('user', '2+2?')}{CHATML}⟦4<|im_end|>⟧"],
        [f"{BRIEF}{chatml('user', '2+2?')}{CHATML}⟦4<|im_end|>⟧"],
        [f"{QWEN}{chatml('user', '2+2?')}{CHATML}⟦4<|im_end|>⟧\n{chatml('user', 'Sure?')}{CHATML}⟦Yes.<|im_end|>⟧"],
        [f"{BRIEF}{chatml('user', '2+2?')}{CHATML}⟦4<|im_end|>⟧\n{chatml('user', 'Sure?')}{CHATML}⟦Yes.<|im_end|>⟧"],
    ],
    # The first answer is asked for with no thought before it, and seen without one later.
    "qwen3": [
        [f"{chatml('user', '2+2?')}{CHATML}⟦{NO_THOUGHT}4<|im_end|>⟧"],
        [f"{BRIEF}{chatml('user', '2+2?')}{CHATML}⟦{NO_THOUGHT}4<|im_end|>⟧"],
        [
            f"{chatml('user', '2+2?')}{CHATML}⟦{NO_THOUGHT}4<|im_end|>⟧",
            f"{chatml('user', '2+2?')}{chatml('assistant', '4')}{chatml('user', 'Sure?')}{CHATML}⟦{NO_THOUGHT}Yes.<|im_end|>⟧",
        ],
        [
            f"{BRIEF}{chatml('user', '2+2?')}{CHATML}⟦{NO_THOUGHT}4<|im_end|>⟧",
            f"{BRIEF}{chatml('user', '2+2?')}{chatml('assistant', '4')}{chatml('user', 'Sure?')}{CHATML}"
            f"⟦{NO_THOUGHT}Yes.<|im_end|>⟧",
        ],
    ],
    "mistral-v0.1": [
        ["<s>[INST] 2+2? [/INST]⟦4</s>⟧"],
        "roles must alternate",
        ["<s>[INST] 2+2? [/INST]⟦4</s>⟧[INST] Sure? [/INST]⟦Yes.</s>⟧"],
        "roles must alternate",
    ],
    "mistral-v0.3": [
        ["<s>[INST] 2+2?[/INST]⟦ 4</s>⟧"],
        ["<s>[INST] Be brief.\n\n2+2?[/INST]⟦ 4</s>⟧"],
        ["<s>[INST] 2+2?[/INST]⟦ 4</s>⟧[INST] Sure?[/INST]⟦ Yes.</s>⟧"],
        [
            "<s>[INST] Be brief.\n\n2+2?[/INST]⟦ 4</s>⟧",
            "<s>[INST] 2+2?[/INST] 4</s>[INST] Be brief.\n\nSure?[/INST]⟦ Yes.</s>⟧",
        ],
    ],
    "gemma-2": [
        [f"{GEMMA}⟦4<end_of_turn><eos>⟧"],
        "System role not supported",
        [
            f"{GEMMA}⟦4<end_of_turn>⟧\n<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n"
            "⟦Yes.<end_of_turn><eos>⟧"
        ],
        "System role not supported",
    ],
    "phi-3": [
        ["<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦4<|end|><|endoftext|>⟧"],
        ["<|system|>\nBe brief.<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦4<|end|><|endoftext|>⟧"],
        [
            "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦4<|end|>⟧\n<|user|>\nSure?<|end|>\n<|assistant|>\n"
            "⟦Yes.<|end|><|endoftext|>⟧"
        ],
        [
            "<|system|>\nBe brief.<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦4<|end|>⟧\n<|user|>\nSure?<|end|>\n"
            "<|assistant|>\n⟦Yes.<|end|><|endoftext|>⟧"
        ],
    ],
    # What was opened has to be closed before an answer without a thought.
    "deepseek-r1-distill": [
        [f"<|begin|>{R1}⟦\n</think>\n\n4<|end|>⟧"],
        [f"<|begin|>Be brief.{R1}⟦\n</think>\n\n4<|end|>⟧"],
        [
            f"<|begin|>{R1}⟦\n</think>\n\n4<|end|>⟧",
            "<|begin|><|User|>2+2?<|Assistant|>4<|end|><|User|>Sure?<|Assistant|><think>\n⟦\n</think>\n\nYes.<|end|>⟧",
        ],
        [
            f"<|begin|>Be brief.{R1}⟦\n</think>\n\n4<|end|>⟧",
            "<|begin|>Be brief.<|User|>2+2?<|Assistant|>4<|end|><|User|>Sure?<|Assistant|><think>\n"
            "⟦\n</think>\n\nYes.<|end|>⟧",
        ],
    ],
}  # fmt: skip
TALKS = (SINGLE, (SYSTEM, *SINGLE), MULTI, (SYSTEM, *MULTI))


@pytest.mark.parametrize("case", range(4), ids=["one", "one+system", "two", "two+system"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_learned(name: str, case: int) -> None:
    right = RIGHT[name][case]
    if isinstance(right, str):
        with pytest.raises(TemplateError, match=f"the chat template refuses the conversation: .*{right}"):
            sequences(name, *TALKS[case])
    else:
        assert sequences(name, *TALKS[case]) == right


@pytest.mark.parametrize("turns", TALKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_learned_once_after_exactly_what_generation_sees(name: str, turns: tuple[Message, ...]) -> None:
    tokenizer, prompting = tokenizer_of(name), Prompting(chat_template=True)
    try:
        found = prompting.encode_sequences(tokenizer, turns)
    except TemplateError:
        return  # `test_what_is_learned` says which
    learned = []
    for places, encoded in found:
        for place in places:
            learned.append(turns[place].content)
            start = prompting.conversation_ids(tokenizer, turns[:place])
            assert encoded.input_ids[: len(start)] == start
            assert encoded.labels[len(start)] == encoded.input_ids[len(start)]
            assert encoded.labels[len(start) - 1] == IGNORED
        assert encoded.input_ids[: encoded.prompt_tokens] == prompting.conversation_ids(tokenizer, turns[: places[-1]])
        assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert learned == [turn.content for turn in turns if turn.role == "assistant"]


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("qwen3", f"{chatml('user', '2+2?')}{CHATML}", "<think>\nTwo and two.\n</think>\n\n4<|im_end|>"),
        ("deepseek-r1-distill", f"<|begin|>{R1}", "Two and two.\n</think>\n\n4<|end|>"),
    ],
)
def test_a_thought_is_learned_whether_the_row_has_it_apart_or_in_the_answer(
    name: str, prompt: str, answer: str
) -> None:
    apart = FOUR._replace(reasoning="Two and two.")
    assert sequences(name, ASKED, THOUGHT) == sequences(name, ASKED, apart) == [f"{prompt}⟦{answer}⟧"]
    # Once the conversation goes on, generation sees the first answer without its thought.
    first, second = sequences(name, ASKED, apart, SURE, YES)
    assert first == f"{prompt}⟦{answer}⟧"
    assert "Two and two" not in second


def test_a_prompt_that_closes_the_thought_is_followed_by_the_answer() -> None:
    family = FAMILIES["deepseek-r1-distill"]
    closing = build(family._replace(template=family.template.replace("<think>\n", "<think>\n\n</think>\n\n")))
    for answer in (FOUR, THOUGHT):
        encoded = Prompting(chat_template=True).encode(closing, [ASKED, answer])
        assert marked(closing, encoded.input_ids, encoded.labels).endswith("<think>\n\n</think>\n\n⟦4<|end|>⟧")


def test_only_the_answers_that_are_learned_need_a_sequence() -> None:
    context = FOUR._replace(learned=False)
    assert sequences("qwen3", ASKED, context, SURE, YES) == RIGHT["qwen3"][2][1:]
    assert sequences("llama-3", ASKED, context, SURE, YES) == [
        f"<|begin_of_text|>{llama('user', '2+2?')}{LLAMA}4<|eot_id|>{llama('user', 'Sure?')}{LLAMA}⟦Yes.<|eot_id|>⟧"
    ]


def test_a_mask_finds_an_answer_that_prefixes_do_not() -> None:
    """Of a template that refuses answers of its own choosing, so that no other answer could be compared."""
    family = FAMILIES["mistral-v0.3"]
    template = family.template.replace(
        "{{ ' ' ~ m.content | trim ~ eos_token }}",
        "{% generation %}{{ ' ' ~ (m.content | int(none) or raise_exception('no number')) ~ eos_token }}{% endgeneration %}",
    )
    assert "{% generation %}" in template
    tokenizer = build(family._replace(template=template))
    ((_, encoded),) = encode_sequences(tokenizer, [SYSTEM, ASKED, FOUR])
    assert [marked(tokenizer, encoded.input_ids, encoded.labels)] == RIGHT["mistral-v0.3"][1]


def test_an_answer_that_cannot_follow_what_generation_sees_is_refused() -> None:
    family = FAMILIES["smollm2"]
    asking = build(family._replace(template=SMOLLM2.replace("assistant\n' }}", "assistant\nWell: ' }}")))
    with pytest.raises(TemplateError, match="it writes 'Well: ', with which this answer does not begin"):
        encode_sequences(asking, [ASKED, FOUR])
    begun = FOUR._replace(content="Well: 4")
    ((_, encoded),) = encode_sequences(asking, [ASKED, begun])
    assert marked(asking, encoded.input_ids, encoded.labels).endswith("assistant\nWell: ⟦4<|im_end|>⟧")


TOOL = Message("tools", '[{"type": "function", "function": {"name": "weather", "description": "of a place"}}]')
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", '{"place": "Oslo"}', "call00001"),))
RESULT = Message("tool", "9 C", tool_call_id="call00001")
NINE = Message("assistant", "9 degrees.")
WEATHER = (TOOL, Message("user", "Weather?"), CALL, RESULT, NINE)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_tools_calls_and_results_are_rendered(name: str) -> None:
    (text,) = sequences(name, *WEATHER)[-1:]
    for part in ('"description": "of a place"', "<tool_response>\n9 C\n</tool_response>", "9 degrees.<|im_end|>⟧"):
        assert part in text
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call><|im_end|>⟧'
    assert sum(call in each for each in sequences(name, *WEATHER)) == 1


def test_tools_under_mistral() -> None:
    (text,) = sequences("mistral-v0.3", *WEATHER)
    assert '⟦[TOOL_CALLS] [{"name": "weather", "arguments": {"place": "Oslo"}, "id": "call00001"}]</s>⟧' in text
    assert text.endswith("[/TOOL_RESULTS]⟦ 9 degrees.</s>⟧")
    first, *_ = sequences("mistral-v0.3", TOOL, SYSTEM, *WEATHER[1:])
    assert first.endswith('"id": "call00001"}]</s>⟧')
    with pytest.raises(TemplateError, match="Tool call IDs should have length 9!"):
        sequences("mistral-v0.3", *WEATHER[:2], CALL._replace(tool_calls=(ToolCall("weather", "{}", "c1"),)))


@pytest.mark.parametrize(
    ("name", "turns", "part"),
    [
        ("llama-3", (TOOL, ASKED, FOUR), "tools"),
        ("smollm2", (TOOL, ASKED, FOUR), "tools"),
        ("smollm2", (ASKED, CALL), "tool_calls"),
        ("smollm2", (ASKED, CALL, RESULT, NINE), "tool_calls"),
        ("deepseek-r1-distill", (ASKED, FOUR, RESULT, NINE), "role tool"),
        ("smollm2", (ASKED, FOUR._replace(reasoning="Hm.")), "reasoning_content"),
    ],
)
def test_a_part_that_the_template_leaves_out_is_refused_by_name(
    name: str, turns: tuple[Message, ...], part: str
) -> None:
    with pytest.raises(TemplateError, match=f"the base's chat template does not know {part}, and leaves it out"):
        sequences(name, *turns)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_that_the_answer_spells_out_is_not_doubled(name: str) -> None:
    tokenizer = tokenizer_of(name)
    end = {"gemma-2": "<end_of_turn>", "phi-3": "<|end|>"}.get(name, tokenizer.eos_token)
    assert sequences(name, ASKED, FOUR._replace(content=f"4{end}")) == RIGHT[name][0]


def test_the_system_prompt_is_no_turn_of_the_data() -> None:
    prompting = Prompting(chat_template=True, system_prompt="Be brief.")
    for talk in (MULTI, (SYSTEM, *MULTI)):
        found = prompting.encode_sequences(tokenizer_of("qwen3"), talk)
        assert [places for places, _ in found] == [[len(talk) - 3], [len(talk) - 1]]
        texts = [marked(tokenizer_of("qwen3"), encoded.input_ids, encoded.labels) for _, encoded in found]
        assert texts == RIGHT["qwen3"][3]
    ((places, _),) = prompting.encode_sequences(tokenizer_of("qwen2.5"), WEATHER)
    assert places == [2, 4]
    assert render(tokenizer_of("qwen2.5"), [SYSTEM, ASKED], True).startswith(BRIEF[:-11])
