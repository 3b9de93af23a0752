"""Conversations in rows: `messages` and their like, a system prompt, earlier exchanges.

What a row says beside text, such as tool calls or images, is refused by name, so that no sample lacks a part of its row
without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.data.fields import RowError, checked_text, given_fields, is_given, text_of
from pipeline.models.chat import Message

SYSTEM = "system"
HISTORY = "history"
MESSAGES = ("messages", "conversations")
_ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_TOOL_COLUMNS = ("tools", "functions")
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
# What is read of a message; whatever else it has is named as not used.
_MESSAGE_KEYS = {"role", "content", "from", "value", "weight", *_TOOL_KEYS}
_NO_TOOLS = "tool calls are not supported yet"


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


def refuse_tools(values: Mapping[str, Any]) -> None:
    """Refuse a row whose columns describe tools.

    Raises:
        RowError: it has such a column.
    """
    for column in _TOOL_COLUMNS:
        if is_given(values.get(column)):
            raise RowError(f"{_NO_TOOLS} (column {column})")


def unread_keys(values: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a row's messages that say something and are not read, as `messages.KEY`."""
    for field in MESSAGES:
        items = values.get(field)
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict):
                yield from (f"{field}.{key}" for key in item.keys() - _MESSAGE_KEYS if is_given(item[key]))


def _turn(item: dict[str, Any]) -> Message:
    role_key, text_key = given_fields(item, [("role", "content"), ("from", "value")])
    if not is_given(item.get(role_key)) and is_given(item.get("from")):
        role_key, text_key = "from", "value"
    role = item.get(role_key)
    if role in _TOOL_ROLES if isinstance(role, str) else False:
        raise RowError(f"{_NO_TOOLS} (role {role})")
    for key in _TOOL_KEYS:
        if is_given(item.get(key)):
            raise RowError(f"{_NO_TOOLS} ({key})")
    if not isinstance(role, str) or role not in _ROLES:
        said = repr(role) if isinstance(role, str | None) else f"of type {type(role).__name__}"
        raise RowError(f"role {said} is none of {', '.join(_ROLES)}")
    content = item.get(text_key)
    if isinstance(content, list):
        content = _joined(content, text_key)
    return Message(_ROLES[role], checked_text(content, text_key), _is_learned(item))


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
