"""Conversations in rows: `messages` and their like, a system prompt, earlier exchanges, tools and their calls.

OpenAI's and ShareGPT's ways of writing become one (`pipeline.models.chat.Message`). What a row says beside that, such as images,
is refused by name, so that no sample lacks a part of its row without a word.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.data.fields import RowError, checked_text, given_fields, is_given, text_of
from pipeline.models.chat import TOOLS, Message, ToolCall

SYSTEM = "system"
HISTORY = "history"
MESSAGES = ("messages", "conversations")
# The columns that describe tools; the second is OpenAI's older name.
TOOL_COLUMNS = ("tools", "functions")
_ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    # ShareGPT's turn whose text is a call.
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_TOOL_ROLES = [role for role, ours in _ROLES.items() if ours == "tool"]
# What is read of a message; whatever else it has is named as not used.
_MESSAGE_KEYS = {
    "role", "content", "from", "value", "weight", "reasoning_content", "tool_calls", "function_call", "tool_call_id",
}  # fmt: skip


def chat_turns(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns of `messages` or `conversations`, up to the last answer that is to be learned.

    An answer with `weight` 0 is context. What follows the last one with weight 1 is left out, since nothing learned depends
    on it.

    Raises:
        RowError: they are no conversation, or say what cannot be used.
    """
    (field,) = given_fields(values, [(name,) for name in MESSAGES])
    items = values.get(field)
    if items is None:
        raise RowError(f"{field} is missing")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RowError(f"{field} is not a list of objects")
    turns = [_turn(item) for item in items]
    _check_order([turn.role for turn in turns])
    learned = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
    if not learned:
        raise RowError("the conversation has no answer to learn: each has weight 0")
    return tuple(turns[: learned[-1] + 1])


def with_system(turns: tuple[Message, ...], values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns with the column `system` before them, if the row has one.

    Raises:
        RowError: it is no text, or the turns begin with another system turn.
    """
    if not is_given(values.get(SYSTEM)):
        return turns
    system = Message(SYSTEM, text_of(values, SYSTEM))
    if turns[0].role != SYSTEM:
        return (system, *turns)
    if turns[0] != system:
        raise RowError("the column system and the conversation's own system turn differ")
    return turns


def history_turns(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns of the column `history`, a list of pairs of what was asked and answered; none if the row has none.

    Raises:
        RowError: it is anything else.
    """
    history = values.get(HISTORY)
    if not is_given(history):
        return ()
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("history is not a list of pairs of texts")
    return tuple(
        Message(role, checked_text(text, "a text of history"))
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )


def with_tools(turns: tuple[Message, ...], values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns with the tools of the row before them, if it has any.

    Raises:
        RowError: they are no list of functions, each with a name.
    """
    (column,) = given_fields(values, [(name,) for name in TOOL_COLUMNS])
    tools = _parsed(values.get(column), column)
    if not is_given(tools):
        return turns
    if not isinstance(tools, list):
        raise RowError(f"{column} is not a list of functions")
    found = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{column} has something in it that is no function with a name")
        found.append({"type": "function", "function": function})
    return (Message(TOOLS, json.dumps(found, ensure_ascii=False)), *turns)


def unread_keys(values: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a row's messages that say something and are not read, as `messages.KEY`."""
    for field in MESSAGES:
        items = values.get(field)
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict):
                read = _MESSAGE_KEYS | ({"name"} if item.get("role") in _TOOL_ROLES else set())
                yield from (f"{field}.{key}" for key in item.keys() - read if is_given(item[key]))


def _turn(item: dict[str, Any]) -> Message:
    role_key, text_key = given_fields(item, [("role", "content"), ("from", "value")])
    if not is_given(item.get(role_key)) and is_given(item.get("from")):
        role_key, text_key = "from", "value"
    role = item.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        said = repr(role) if isinstance(role, str | None) else f"of type {type(role).__name__}"
        raise RowError(f"role {said} is none of {', '.join(_ROLES)}")
    content = item.get(text_key)
    if isinstance(content, list):
        content = _joined(content, text_key)
    if role == "function_call":
        calls, content = _calls(_parsed(checked_text(content, text_key), text_key), text_key), None
    else:
        calls = _message_calls(item)
    _check_place(item, _ROLES[role])
    text = "" if calls and not is_given(content) else checked_text(content, text_key)
    reasoning, call, name = (
        checked_text(item[key], key) if is_given(item.get(key)) else ""
        for key in ("reasoning_content", "tool_call_id", "name" if role in _TOOL_ROLES else "")
    )
    return Message(_ROLES[role], text, _is_learned(item), reasoning, calls, call, name)


def _check_place(item: Mapping[str, Any], role: str) -> None:
    """Refuse what belongs to another role, and would be lost here."""
    for key in ("tool_calls", "function_call", "reasoning_content"):
        if role != "assistant" and is_given(item.get(key)):
            raise RowError(f"{key} in a turn of role {role}; only an assistant has it")
    if role != "tool" and is_given(item.get("tool_call_id")):
        raise RowError(f"tool_call_id in a turn of role {role}; only a tool has it")


def _message_calls(item: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """The calls of a message as OpenAI writes them, now and formerly."""
    (key,) = given_fields(item, [("tool_calls",), ("function_call",)])
    return _calls(item[key], key) if is_given(item.get(key)) else ()


def _calls(value: Any, field: str) -> tuple[ToolCall, ...]:
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise RowError(f"{field} has something in it that is no call with a name")
        arguments = _parsed(call.get("arguments"), "arguments of a call")
        if not isinstance(arguments := {} if arguments is None else arguments, dict):
            raise RowError("the arguments of a call are not an object")
        name = item.get("id")
        calls.append(
            ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False), name if isinstance(name, str) else "")
        )
    return tuple(calls)


def _parsed(value: Any, field: str) -> Any:
    """A value that may be written as a text of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise RowError(f"{field} is not valid JSON") from None


def _joined(parts: list[Any], field: str) -> str:
    """The texts of a content's parts, one a line as vLLM joins them."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            said = repr(kind) if isinstance(kind, str) else "without a type"
            raise RowError(f"{field} has a part {said}; only parts of type 'text' are supported")
        texts.append(checked_text(part.get("text"), f"a part of {field}"))
    return "\n".join(texts)


def _is_learned(item: Mapping[str, Any]) -> bool:
    weight = item.get("weight")
    if weight is None:
        return True
    if not isinstance(weight, bool | int | float) or weight not in (0, 1):
        raise RowError("weight is neither 0 nor 1")
    return bool(weight)


def _check_order(roles: list[str]) -> None:
    if not roles or roles[-1] != "assistant":
        raise RowError("the conversation does not end with an assistant turn")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowError("the conversation has no user turn before its first answer")
    if any(role == "tool" and before not in ("assistant", "tool") for before, role in itertools.pairwise(roles)):
        raise RowError("the turn of a tool does not follow an answer")
