"""What clients of a model ask: prompts, or conversations as OpenAI's interface has them, and how answers are decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import ModelError
from pipeline.models.prompting import Message

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        temperature: 0 takes the likeliest token each time; above 0, tokens are drawn.
        top_p: tokens are drawn among the likeliest whose probabilities reach this sum.
        stop: texts that end an answer, and are no part of it.

    Raises:
        ModelError: a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ModelError(f"temperature is {self.temperature}; it is a number of at least 0, and 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ModelError(f"top_p is {self.top_p}; it is above 0 and at most 1")


GREEDY = Decoding()


def read_request(request: Any) -> str | list[Message]:
    """A prompt, or the conversation of a list of messages or of an object with `messages`.

    Raises:
        ModelError: it is neither, or its messages are not what a model of texts can answer.
    """
    if isinstance(request, str):
        return request
    if isinstance(request, Mapping):
        if unknown := [str(key) for key in request if key != "messages"]:
            raise ModelError(
                f"a request has {', '.join(unknown)} beside its messages; max_new_tokens, temperature, top_p and stop go into "
                "params"
            )
        request = request.get("messages")
    if not isinstance(request, Sequence) or not request:
        raise ModelError('a request is neither a prompt nor a list of messages, {"role": "user", "content": "..."}')
    turns = [_turn(message) for message in request]
    if turns[-1].role != "user":
        raise ModelError(f"the last message is of role {request[-1]['role']}; the model answers one of role user")
    return turns


def _turn(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ModelError(f"a message is {message!r}, and not an object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise ModelError(f"a message has the role {role!r}; the model knows {', '.join(_ROLES)}")
    if called := [key for key in ("tool_calls", "function_call") if message.get(key)]:
        raise ModelError(f"a message has {called[0]}, and this model reads text alone")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "\n".join(_text(part) for part in content)  # as in training data, and in vLLM
    if not isinstance(content, str):
        raise ModelError(f"a message of role {role} has the content {content!r}, which is no text")
    return Message(_ROLES[role], content)


def _text(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ModelError(f"a message has the part {part!r}; this model reads parts of type text alone")
    return text
