"""What is learned of rows of every form: each row with its text, what is learned in ⟦ ⟧, or the reason why it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.config.settings import DataSettings
from pipeline.data.forms import decide_form, read_samples
from pipeline.data.prepared import Rejection, Sample
from pipeline.data.readers import RawRow
from pipeline.data.tokenised import tokenise_text
from pipeline.models.prompting import Prompting
from tests.support.chat_templates import marked, tokenizer_of

Row = dict[str, Any]
# Of each sample its sequences; a text that does not have ⟦ is the beginning of a reason.
Right = list[str] | str


def user(text: str, **more: Any) -> Row:
    return {"role": "user", "content": text, **more}


def said(text: str | None, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def talk(*turns: Row, **columns: Any) -> Row:
    return {"messages": list(turns), **columns}


def gpt(*turns: tuple[str, str], **columns: Any) -> Row:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **columns}


def ml(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def asked(*turns: str, system: str = "You are Qwen.") -> str:
    """Turns of user and assistant under Qwen2.5's template, up to where the next answer begins."""
    roles = ("user", "assistant")
    text = "".join(ml(roles[place % 2], turn) for place, turn in enumerate(turns))
    return f"{ml('system', system)}{text}<|im_start|>assistant\n"


def learned(text: str) -> str:
    return f"⟦{text}<|im_end|>⟧"


FOUR = asked("2+2?") + learned("4")
BRIEF = asked("2+2?", system="Be brief.") + learned("4")
TWICE = f"{FOUR}\n{ml('user', 'Sure?')}<|im_start|>assistant\n{learned('Yes.')}"
LAST = f"{asked('2+2?', '4', 'Sure?')}{learned('Yes.')}"
FUNCTION = {"name": "weather", "description": "of a place"}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
RESULT = "user\n<tool_response>\n9 C\n</tool_response>"
TOOLS = f"You are Qwen.\n# Tools\n<tools>\n{json.dumps(TOOL)}\n</tools>"
NINE = f"{learned(CALLED)}\n<|im_start|>{RESULT}<|im_end|>\n<|im_start|>assistant\n{learned('9 degrees.')}"
WITH_TOOLS, WITHOUT_TOOLS = asked("Weather?", system=TOOLS) + NINE, asked("Weather?") + NINE
PLACED = json.dumps({"name": "weather", "arguments": {"place": "Oslo"}})
SURE = (user("2+2?"), said("4"), user("Sure?"), said("Yes."))
ALPACA = {"instruction": "2+2?", "output": "4"}
BOOLQ = {"instruction": "Odd?\n\nAnswer format: true/false", "output": "the correct answer is true", "answer": "true"}
ARC = {"text": ["ice", "iron"], "label": ["A", "B"]}

# Under Qwen2.5's chat template.
CHAT: list[tuple[Row, Right]] = [
    ({"prompt": "2+2?", "completion": "4"}, [FOUR]),
    ({"prompt": "2+2?", "completion": "4", "system": "Be brief."}, [BRIEF]),
    ({"prompt": "2+2?", "completion": "4<|im_end|>"}, [FOUR]),
    ({"prompt": "2+2?", "completion": "4<|im_end|>\n<|im_end|>\n"}, [FOUR]),
    ({"prompt": "2+2?", "references": ["4", "four"]}, [FOUR, asked("2+2?") + learned("four")]),
    ({"prompt": "2+2?", "completion": "<|im_end|>"}, "the answer is nothing but the end-of-sequence token"),
    ({"prompt": "2+2?", "completion": ""}, "completion is empty"),
    ({"meaning_representation": "2+2?", "human_reference": "4"}, [FOUR]),
    ({"meaning_representation": "2+2?", "target": "4", "references": []}, [FOUR]),
    (ALPACA, [FOUR]),
    (ALPACA | {"input": "Now."}, [asked("2+2?\n\nNow.") + learned("4")]),
    (ALPACA | {"system": "Be brief."}, [BRIEF]),
    (ALPACA | {"instruction": "Sure?", "output": "Yes.", "history": [["2+2?", "4"]]}, [TWICE]),
    (ALPACA | {"tools": json.dumps([FUNCTION])}, [asked("2+2?", system=TOOLS) + learned("4")]),
    (BOOLQ, [asked(BOOLQ["instruction"]) + learned("the correct answer is true")]),
    (BOOLQ | {"input": "", "system": None}, [asked(BOOLQ["instruction"]) + learned("the correct answer is true")]),
    ({"question": "Melts?", "choices": ARC, "answerKey": "A"}, [asked("Melts?") + learned("ice")]),
    ({"question_stem": "Melts?", "choices": ARC, "answerKey": "B"}, [asked("Melts?") + learned("iron")]),
    ({"question": "Melts?", "choices": ["ice", "iron"], "answer": 1}, [asked("Melts?") + learned("iron")]),
    ({"prompt": "Melts?", "choices": ["ice", "iron"], "answer": "ice"}, [asked("Melts?") + learned("ice")]),
    ({"prompt": "Melts?", "choices": ["ice", "iron"], "answer": "C"}, "answer is none of the choices"),
    (talk(user("2+2?"), said("4")), [FOUR]),
    (talk({"role": "system", "content": "Be brief."}, user("2+2?"), said("4")), [BRIEF]),
    (talk({"role": "developer", "content": "Be brief."}, user("2+2?"), said("4")), [BRIEF]),
    (talk(user("2+2?"), said("4"), system="Be brief."), [BRIEF]),
    (talk(*SURE), [TWICE]),
    (talk(user("2+2?"), said("4", weight=0), *SURE[2:]), [LAST]),
    (talk(user("2+2?"), said("4"), user("Sure?"), said("Yes.", weight=0)), [FOUR]),
    (talk(user("2+2?"), said("4", weight=0)), "the conversation has no answer to learn"),
    (talk(user("2+2?"), said("4"), user("Sure?")), "the conversation does not end with an assistant turn"),
    (talk(said("4")), "the conversation has no user turn"),
    (talk(user("2+2?"), said("4<|im_end|>"), user("Sure?"), said("Yes.<|im_end|>")), [TWICE]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, said("4")]}, [FOUR]),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, said("4")]}, "content has a part 'image'"),
    (
        talk(user("Weather?"), said(None, tool_calls=[CALL]), {"role": "tool", "tool_call_id": "c1", "content": "9 C"}, said("9 degrees."), tools=[TOOL]),
        [WITH_TOOLS],
    ),
    (
        talk(user("Weather?"), said("", tool_calls=[CALL]), {"role": "tool", "content": "9 C"}, said("9 degrees.")),
        [WITHOUT_TOOLS],
    ),
    (
        talk(user("Weather?"), said(None, function_call=CALL["function"]), {"role": "function", "name": "weather", "content": "9 C"}, said("9 degrees."), functions=[FUNCTION]),
        [WITH_TOOLS],
    ),
    (talk(user("Weather?"), said(None, tool_calls=[CALL]), tools=[TOOL]), [asked("Weather?", system=TOOLS) + learned(CALLED)]),
    (talk(user("Weather?"), said("Let me see.", tool_calls=[CALL])), [asked("Weather?") + learned(f"Let me see.\n{CALLED}")]),
    (talk(user("Weather?"), said(None)), "content is missing"),
    (talk(user("2+2?"), said("4", reasoning_content="Two and two.")), "the base's chat template does not know reasoning_content"),
    (gpt(("human", "2+2?"), ("gpt", "4")), [FOUR]),
    (gpt(("system", "Be brief."), ("human", "2+2?"), ("gpt", "4")), [BRIEF]),
    (gpt(("human", "2+2?"), ("gpt", "4"), system="Be brief.", tools=""), [BRIEF]),
    (gpt(("human", "2+2?"), ("gpt", "4"), ("human", "Sure?"), ("gpt", "Yes.")), [TWICE]),
    (gpt(("human", "Weather?"), ("function_call", PLACED), ("observation", "9 C"), ("gpt", "9 degrees."), tools=json.dumps([FUNCTION])), [WITH_TOOLS]),
    (gpt(("human", "Weather?"), ("function_call", f"[{PLACED}]"), ("observation", "9 C"), ("gpt", "9 degrees.")), [WITHOUT_TOOLS]),
    (gpt(("human", "Weather?"), ("gpt", CALLED), ("tool", "9 C"), ("gpt", "9 degrees.")), [WITHOUT_TOOLS]),
    (gpt(("human", "2+2?"), ("bing", "4")), "role 'bing' is none of"),
    (gpt(("human", "Weather?"), ("function_call", "weather")), "value is not valid JSON"),
    ({"text": "A text."}, ["⟦A text.<|im_end|>⟧"]),
    ({"text": "A text.<|im_end|>"}, ["⟦A text.<|im_end|>⟧"]),
]  # fmt: skip

# Without a chat template, on a tokenizer that knows `<s>` and `</s>`.
PLAIN: list[tuple[Row, Right]] = [
    ({"prompt": "2+2? ", "completion": "4"}, ["2+2?⟦ 4</s>⟧"]),
    ({"prompt": "2+2?", "completion": "4</s>"}, ["2+2?⟦4</s>⟧"]),
    ({"prompt": "2+2?", "completion": "4</s></s>"}, ["2+2?⟦4</s>⟧"]),
    ({"prompt": "<s>[INST] 2+2? [/INST]", "completion": "4</s>"}, ["<s>[INST] 2+2? [/INST]⟦4</s>⟧"]),
    (ALPACA | {"instruction": "Sure?", "output": "Yes.", "history": [["2+2?", "4"]]}, ["2+2?\n\n4\n\nSure?⟦Yes.</s>⟧"]),
    ({"text": "<s>A text.</s>"}, ["⟦<s>A text.</s>⟧"]),
    (talk(user("2+2?"), said("4")), ["2+2?⟦4</s>⟧"]),
    (talk(*SURE), ["2+2?\n\n4\n\nSure?⟦Yes.</s>⟧"]),
    (talk(user("Weather?"), said(None, tool_calls=[CALL])), "tool_calls can only be written by a chat template"),
    (ALPACA | {"tools": json.dumps([FUNCTION])}, "tools can only be written by a chat template"),
    (talk(user("2+2?"), said("4", reasoning_content="Hm.")), "reasoning_content can only be written by a chat template"),
]  # fmt: skip

THOUGHT = "<think>\nTwo and two.\n</think>\n\n4"
Q3 = f"{ml('user', '2+2?')}<|im_start|>assistant\n"
# Under templates that rewrite what was said, or refuse it: Qwen3's, Mistral's v0.1.
OTHERS: list[tuple[str, Row, Right]] = [
    ("qwen3", talk(user("2+2?"), said("4", reasoning_content="Two and two.")), [Q3 + learned(THOUGHT)]),
    ("qwen3", talk(user("2+2?"), said(THOUGHT)), [Q3 + learned(THOUGHT)]),
    (
        "qwen3",
        talk(user("2+2?"), said(THOUGHT), *SURE[2:]),
        [
            Q3 + learned(THOUGHT),
            f"{ml('user', '2+2?')}{ml('assistant', '4')}{ml('user', 'Sure?')}<|im_start|>assistant\n"
            + learned("<think>\n\n</think>\n\nYes."),
        ],
    ),
    ("mistral-v0.1", talk(*SURE), ["<s>[INST] 2+2? [/INST]⟦4</s>⟧[INST] Sure? [/INST]⟦Yes.</s>⟧"]),
    ("mistral-v0.1", ALPACA | {"system": "Be brief."}, "the chat template refuses the conversation: roles must alternate"),
    ("mistral-v0.1", {"prompt": "<s>[INST] 2+2? [/INST]", "completion": "4"}, "a turn begins with '<s>', which is for"),
]  # fmt: skip


def sequences(name: str, row: Row, chat: bool, **values: Any) -> Right:
    settings, tokenizer = DataSettings(train=["f"], chat_template=chat, **values), tokenizer_of(name)
    found: list[str] = []
    for item in read_samples([RawRow("f:1", row)], settings, decide_form(settings, row, "f:1")):
        made = tokenise_text(Prompting(chat_template=chat), item, tokenizer, 512) if isinstance(item, Sample) else item
        if isinstance(made, Rejection):
            return made.reason
        found += [marked(tokenizer, list(one.input_ids), list(one.labels)) for one in made]
    return found


def check(found: Right, right: Right) -> None:
    if isinstance(right, str):
        assert isinstance(found, str)
        assert found.startswith(right)
    else:
        assert found == right


@pytest.mark.parametrize(("row", "right"), CHAT)
def test_under_a_chat_template(row: Row, right: Right) -> None:
    if "text" in row:
        check(sequences("qwen2.5", row, False), right)
    else:
        check(sequences("qwen2.5", row, True), right)


@pytest.mark.parametrize(("row", "right"), PLAIN)
def test_without_a_chat_template(row: Row, right: Right) -> None:
    check(sequences("mistral-v0.1", row, False), right)


@pytest.mark.parametrize(("name", "row", "right"), OTHERS)
def test_under_templates_that_rewrite_or_refuse(name: str, row: Row, right: Right) -> None:
    check(sequences(name, row, True), right)


def test_the_last_answer_alone() -> None:
    assert sequences("qwen2.5", talk(*SURE), True, learn="last") == [LAST]
    history = ALPACA | {"instruction": "Sure?", "output": "Yes.", "history": [["2+2?", "4"]]}
    assert sequences("qwen2.5", history, True, learn="last") == [LAST]


def test_a_call_is_what_an_answer_is_compared_with() -> None:
    tokenizer = tokenizer_of("qwen2.5")
    row = talk(user("Weather?"), said(None, tool_calls=[CALL]))
    (sample,) = read_samples([RawRow("f:1", row)], DataSettings(train=["f"]), "chat")
    assert isinstance(sample, Sample)
    (made,) = tokenise_text(Prompting(chat_template=True), sample, tokenizer, 512)
    assert made.sample.references == (CALLED,)


def test_the_corpus_is_large_enough() -> None:
    assert len(CHAT) + len(PLAIN) + len(OTHERS) >= 60
