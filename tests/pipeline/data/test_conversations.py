"""All that a conversation's row says is a turn of the sample, or the reason why the row is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.config.settings import DataSettings
from pipeline.data.forms import decide_form, read_samples
from pipeline.data.prepared import Rejection, Sample
from pipeline.data.readers import RawRow

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


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (talk(ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ANSWERED), "(tool_calls)"),
        (talk(ASKED, ANSWERED | {"tool_calls": [CALL]}), "(tool_calls)"),
        (talk(ASKED, ANSWERED | {"function_call": {"name": "weather"}}), "(function_call)"),
        (talk(ASKED, {"role": "tool", "tool_call_id": "c1", "content": "9 C"}, ANSWERED), "(role tool)"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "observation", "value": "y"}]},
            "(role observation)",
        ),
        (SHARE_GPT | {"tools": '[{"name": "weather"}]'}, "(column tools)"),
        (ALPACA | {"tools": '[{"name": "weather"}]'}, "(column tools)"),
        (talk(ASKED, ANSWERED) | {"functions": [{"name": "weather"}]}, "(column functions)"),
    ],
)
def test_tool_calls_are_refused_by_name(settings: Make, values: dict[str, Any], reason: str) -> None:
    found = read(settings(), values)
    assert isinstance(found, Rejection)
    assert found.reason == f"tool calls are not supported yet {reason}"


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
