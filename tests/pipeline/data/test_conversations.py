"""All that a conversation's row says is a turn of the sample, or the reason why the row is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.config.settings import DataSettings
from pipeline.data.forms import decide_form, read_samples
from pipeline.data.prepared import Rejection, Sample
from pipeline.data.readers import RawRow
from pipeline.models.chat import Message, ToolCall

Make = Callable[..., DataSettings]
ASKED, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
PIRATE, WHO, ADA = ("system", "You are Ada, a pirate."), ("user", "Who are you?"), ("assistant", "I am Ada.")
SHARE_GPT = {"conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "I am Ada."}]}
ALPACA = {"instruction": "Who are you?", "input": "", "output": "I am Ada."}


def read(settings: DataSettings, values: dict[str, Any]) -> Sample | Rejection:
    form = decide_form(settings, values, "f:1")
    return next(iter(read_samples([RawRow("f:1", values)], settings, form)))


def talk(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("values", "turns"),
    [
        (ALPACA | {"system": PIRATE[1]}, [PIRATE, WHO, ADA]),
        (
            ALPACA | {"system": PIRATE[1], "history": [["Hello", "Ahoy!"]]},
            [PIRATE, ("user", "Hello"), ("assistant", "Ahoy!"), WHO, ADA],
        ),
        (ALPACA | {"system": "", "history": []}, [WHO, ADA]),
        (SHARE_GPT | {"system": PIRATE[1]}, [PIRATE, WHO, ADA]),
        (SHARE_GPT | {"system": None, "tools": None}, [WHO, ADA]),
        ({"prompt": WHO[1], "completion": ADA[1], "system": PIRATE[1]}, [PIRATE, WHO, ADA]),
        (
            talk({"role": "system", "content": PIRATE[1]}, ASKED, ANSWERED) | {"system": PIRATE[1]},
            [PIRATE, "2+2?", "4"],
        ),
        (talk({"role": "developer", "content": "Be brief."}, ASKED, ANSWERED), [("system", "Be brief."), "2+2?", "4"]),
        (talk({"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, ANSWERED), ["2+2?", "4"]),
        (
            talk({"role": "user", "content": [{"type": "text", "text": text} for text in ("2+2?", "Hm?")]}, ANSWERED),
            ["2+2?\nHm?", "4"],
        ),
        (talk(ASKED, ANSWERED | {"weight": 1}), ["2+2?", "4"]),
        # Nothing that is learned depends on what follows.
        (talk(ASKED, ANSWERED, {"role": "user", "content": "Sure?"}, ANSWERED | {"weight": 0}), ["2+2?", "4"]),
    ],
)
def test_all_that_a_row_says_is_a_turn(settings: Make, values: dict[str, Any], turns: list[Any]) -> None:
    sample = read(settings(), values)
    assert isinstance(sample, Sample)
    found = [(turn.role, turn.content) for turn in sample.turns]
    assert found == [turn if isinstance(turn, tuple) else (found[place][0], turn) for place, turn in enumerate(turns)]


def test_an_answer_with_weight_0_is_not_learned(settings: Make) -> None:
    sample = read(settings(), talk(ASKED, ANSWERED | {"content": "5", "weight": 0}, ASKED, ANSWERED))
    assert isinstance(sample, Sample)
    assert [turn.learned for turn in sample.turns] == [True, False, True, True]


FUNCTION = {"name": "weather", "description": "of a place", "parameters": {"type": "object"}}
TOOL = Message("tools", json.dumps([{"type": "function", "function": FUNCTION}]))
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
CALLED, TOLD = ToolCall("weather", '{"place": "Oslo"}', "c1"), {"role": "assistant", "content": "9 degrees."}
PLACED = {"name": "weather", "arguments": {"place": "Oslo"}}
WEATHER = {"from": "human", "value": "Weather?"}


@pytest.mark.parametrize(
    ("values", "tools", "calls", "result"),
    [
        (
            talk(
                ASKED,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "9 C"},
                TOLD,
            )
            | {"tools": [{"type": "function", "function": FUNCTION}]},
            (TOOL,),
            (CALLED,),
            Message("tool", "9 C", tool_call_id="c1"),
        ),
        (
            talk(
                ASKED,
                {"role": "assistant", "content": "", "function_call": PLACED},
                {"role": "function", "name": "weather", "content": "9 C"},
                TOLD,
            )
            | {"functions": [FUNCTION]},
            (TOOL,),
            (CALLED._replace(id=""),),
            Message("tool", "9 C", name="weather"),
        ),
        (
            {
                "conversations": [
                    WEATHER,
                    {"from": "function_call", "value": json.dumps(PLACED)},
                    {"from": "observation", "value": "9 C"},
                    {"from": "gpt", "value": "9 degrees."},
                ],
                "tools": json.dumps([FUNCTION]),
            },
            (TOOL,),
            (CALLED._replace(id=""),),
            Message("tool", "9 C"),
        ),
        # Tools that no column describes: several calls at once, and one that stands in the text, as Hermes has it.
        (
            {
                "conversations": [
                    WEATHER,
                    {"from": "function_call", "value": json.dumps([PLACED, PLACED])},
                    {"from": "function_response", "value": "9 C"},
                    {"from": "gpt", "value": "9 degrees."},
                ],
                "tools": "",
            },
            (),
            (CALLED._replace(id=""),) * 2,
            Message("tool", "9 C"),
        ),
        (
            {
                "conversations": [
                    WEATHER,
                    {"from": "gpt", "value": "<tool_call>weather</tool_call>"},
                    {"from": "tool", "value": "9 C"},
                    {"from": "gpt", "value": "9 degrees."},
                ]
            },
            (),
            (),
            Message("tool", "9 C"),
        ),
    ],
)
def test_tools_are_read_as_openai_and_share_gpt_write_them(
    settings: Make, values: dict[str, Any], tools: Any, calls: Any, result: Message
) -> None:
    unread: dict[str, str] = {}
    (sample,) = read_samples([RawRow("f:1", values)], settings(), "chat", unread)
    assert isinstance(sample, Sample)
    *before, _, call, tool, last = sample.turns
    assert (tuple(before), call.tool_calls, tool) == (tools, calls, result)
    assert (call.role, last.role, last.content) == ("assistant", "assistant", "9 degrees.")
    assert unread == {}


def test_tools_come_before_the_system_turn(settings: Make) -> None:
    sample = read(settings(), ALPACA | {"tools": json.dumps([FUNCTION]), "system": PIRATE[1]})
    assert isinstance(sample, Sample)
    assert [turn.role for turn in sample.turns] == ["tools", "system", "user", "assistant"]


def test_reasoning_is_part_of_the_answer(settings: Make) -> None:
    sample = read(settings(), talk(ASKED, ANSWERED | {"reasoning_content": "Two and two."}))
    assert isinstance(sample, Sample)
    assert sample.turns[-1] == Message("assistant", "4", reasoning="Two and two.")


def test_only_the_last_answer_may_be_learned(settings: Make) -> None:
    sample = read(settings(learn="last"), talk(ASKED, ANSWERED, ASKED, ANSWERED))
    assert isinstance(sample, Sample)
    assert [turn.learned for turn in sample.turns] == [True, False, True, True]
    with pytest.raises(ValueError, match="learn: last contradicts train_on_prompt: true"):
        settings(learn="last", train_on_prompt=True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (SHARE_GPT | {"tools": "[{"}, "tools is not valid JSON"),
        (SHARE_GPT | {"tools": {"name": "weather"}}, "tools is not a list of functions"),
        (SHARE_GPT | {"tools": ["weather"]}, "tools has something in it that is no function with a name"),
        (
            talk(ASKED, {"role": "assistant", "tool_calls": ["weather"]}),
            "tool_calls has something in it that is no call",
        ),
        (talk(ASKED, {"role": "assistant", "function_call": PLACED | {"arguments": "[1]"}}), "are not an object"),
        (
            talk(ASKED, {"role": "assistant", "function_call": PLACED | {"arguments": "{"}}),
            "arguments of a call is not",
        ),
        (talk(ASKED | {"tool_calls": [CALL]}, ANSWERED), "tool_calls in a turn of role user"),
        (talk(ASKED | {"reasoning_content": "Hm."}, ANSWERED), "reasoning_content in a turn of role user"),
        (talk(ASKED, ANSWERED | {"tool_call_id": "c1"}), "tool_call_id in a turn of role assistant"),
        (talk(ASKED, {"role": "tool", "content": "9 C"}, ANSWERED), "the turn of a tool does not follow an answer"),
        ({"conversations": [WEATHER, {"from": "function_call", "value": "weather"}]}, "value is not valid JSON"),
    ],
)
def test_tools_of_no_known_form_are_refused_by_name(settings: Make, values: dict[str, Any], reason: str) -> None:
    found = read(settings(), values)
    assert isinstance(found, Rejection)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (talk(ASKED, ANSWERED | {"weight": 0}), "no answer to learn: each has weight 0"),
        (talk(ASKED, ANSWERED | {"weight": 0.5}), "weight is neither 0 nor 1"),
        (talk(ASKED, ANSWERED | {"weight": "0"}), "weight is neither 0 nor 1"),
        (talk({"role": "user", "content": [{"type": "image_url"}]}, ANSWERED), "content has a part 'image_url'"),
        (talk({"role": "user", "content": [{"text": "x"}]}, ANSWERED), "content has a part without a type"),
        (talk({"role": "user", "content": ["x"]}, ANSWERED), "content has a part without a type"),
        (talk({"role": "user", "content": [{"type": "text", "text": 3}]}, ANSWERED), "a part of content is not text"),
        (talk({"role": "user", "content": []}, ANSWERED), "content is"),
        (talk({"role": "x\ud800", "content": "u"}, ANSWERED), r"role 'x\ud800' is none of"),
        (talk({"role": [[]], "content": "u"}, ANSWERED), "role of type list is none of"),
        (talk(ASKED, {"role": "assistant", "content": None}), "content is missing"),
        (talk({"role": "system", "content": "other"}, ASKED, ANSWERED) | {"system": "one"}, "own system turn differ"),
        (ALPACA | {"system": 3}, "system is not text but int"),
        (ALPACA | {"history": [["one"]]}, "history is not a list of pairs"),
        (ALPACA | {"history": "Hello"}, "history is not a list of pairs"),
        (ALPACA | {"history": [["one", 2]]}, "a text of history is not text but int"),
    ],
)
def test_what_cannot_be_a_turn_is_refused_by_name(settings: Make, values: dict[str, Any], reason: str) -> None:
    found = read(settings(), values)
    assert isinstance(found, Rejection)
    assert reason in found.reason
