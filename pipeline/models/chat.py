"""Conversations under a tokenizer's chat template: what generation sees, and what is learned after it.

An answer is learned after exactly the token ids that generation would start from (`render` with `generation=True`). Answers share
a sequence as far as the template only appends to a conversation as it goes on. Where it rewrites what was there (drops earlier
reasoning, moves the system prompt to the last user turn), the next answer begins a sequence of its own.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.core.errors import DataError, one_line
from pipeline.models.token_ids import continued_ids, ids_of

IGNORED = -100
# Any tokenizer with the interface of `transformers.PreTrainedTokenizerBase`, whose import takes seconds.
Tokenizer = Any

# The role of a first turn that is no turn: the tools that may be called, as a JSON list of OpenAI's descriptions.
TOOLS = "tools"
# An answer that no text begins with, and that no template treats in a way of its own.
_PROBE = "\ue000probe"
_THINK_OPENED = re.compile(r"<think>\s*(?P<closed></think>\s*)?$")
_MASK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ToolCall(NamedTuple):
    """A call of a tool.

    Attributes:
        name: of the tool.
        arguments: a JSON object.
        id: what the tool's answer refers to it by; may be empty.
    """

    name: str
    arguments: str
    id: str = ""


class Message(NamedTuple):
    """One turn.

    Attributes:
        role: `system`, `user`, `assistant`, `tool` (what a tool answered) or `tools` (see `TOOLS`).
        content: its text; empty where an answer consists of tool calls.
        learned: for an answer, whether it is to be learned; if not, it is context.
        reasoning: what an answer's author thought before it (`reasoning_content`).
        tool_calls: the tools that an answer calls.
        tool_call_id: which call the turn of a tool belongs to.
        name: of the tool whose turn it is.
    """

    role: str
    content: str
    learned: bool = True
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


class Encoded(NamedTuple):
    """A tokenised conversation.

    Attributes:
        input_ids: Its token ids.
        labels: The ids to be learned, and -100 elsewhere.
        prompt_tokens: How many ids lie before the last assistant turn. Generation starts from these.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_tokens: int


class TemplateError(DataError):
    """The tokenizer's chat template rejects one conversation (a role, an order). Others may be accepted."""


def render(tokenizer: Tokenizer, conversation: Sequence[Message], generation: bool) -> str:
    """The text of a conversation under the tokenizer's chat template.

    Args:
        generation: whether what asks for the next answer follows.

    Raises:
        TemplateError: the template rejects the conversation.
    """
    turns, tools = _as_templates_take_it(conversation)
    try:
        text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a template is a program: it may divide by zero, recurse, or add a number to a text
        kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
        raise TemplateError(f"the chat template refuses the conversation: {kind}{one_line(error)}") from None
    return str(text)


def encode_sequences(tokenizer: Tokenizer, conversation: Sequence[Message]) -> list[tuple[list[int], Encoded]]:
    """Tokenise a conversation whose last turn is an answer to be learned.

    Returns:
        One sequence or several, which together learn each answer once: the places of the answers that a sequence learns, and
        its ids. It holds the turns up to the last of them, and ends with EOS.

    Raises:
        TemplateError: the template rejects the conversation, leaves out a part of it, or where it asks for an answer writes
            something that the answer does not begin with.
    """
    _refuse_bos(tokenizer, conversation)
    _check_context(tokenizer, conversation)
    sequences: list[tuple[list[int], Encoded]] = []
    for index, turn in enumerate(conversation):
        if turn.role != "assistant" or not turn.learned:
            continue
        before = render(tokenizer, conversation[:index], generation=True)
        answer = _answer(tokenizer, conversation[: index + 1], before)
        start = ids_of(tokenizer, before)
        ids = continued_ids(tokenizer, start, before, before + answer)
        learned, labels = [index], [IGNORED] * len(start)
        if sequences and start[: len(sequences[-1][1].input_ids)] == sequences[-1][1].input_ids:
            earlier, written = sequences.pop()
            learned = [*earlier, index]
            labels[: len(written.labels)] = written.labels
        sequences.append((learned, Encoded(ids, labels + ids[len(start) :], len(start))))
    return [(learned, _ended(tokenizer, encoded)) for learned, encoded in sequences]


def learning(conversation: Sequence[Message], learned: list[int]) -> tuple[Message, ...]:
    """The turns up to the last of the answers at the places `learned`; all other answers are context."""
    return tuple(
        turn._replace(learned=index in learned) if turn.role == "assistant" else turn
        for index, turn in enumerate(conversation[: learned[-1] + 1])
    )


def _ended(tokenizer: Tokenizer, encoded: Encoded) -> Encoded:
    if encoded.input_ids[-1:] == [tokenizer.eos_token_id]:
        return encoded
    eos = [tokenizer.eos_token_id]
    return encoded._replace(input_ids=encoded.input_ids + eos, labels=encoded.labels + eos)


def _answer(tokenizer: Tokenizer, turns: Sequence[Message], before: str) -> str:
    """The text of the last turn as it has to be generated after `before`, up to the token that ends it."""
    answer = _continuation(tokenizer, turns, before)
    for part, other in _altered(turns[-1]):
        if _continuation(tokenizer, [*turns[:-1], other], before) == answer:
            raise TemplateError(_unknown(part))
    if not answer.strip():
        raise TemplateError("the base's chat template leaves out the answer; choose a base whose template does not")
    return _cut_after_end(tokenizer, answer)


def _continuation(tokenizer: Tokenizer, turns: Sequence[Message], before: str) -> str:
    # First by prefixes: where the text goes on from what generation sees, nothing else can be meant. A mask says where the
    # template's author saw the answer, but neither what stands before it when it is generated nor, often, how it ends. So it
    # only finds the answer where prefixes do not; without one, the place where another answer would differ does.
    whole = render(tokenizer, turns, generation=False)
    if whole.startswith(before):
        return whole[len(before) :]
    opened = _THINK_OPENED.search(before)
    asked = before[: opened.start()] if opened else before
    if whole.startswith(asked):
        body = whole[len(asked) :]
    else:
        place = _marked_place(tokenizer, turns)
        if place is None:
            other = render(tokenizer, [*turns[:-1], Message("assistant", _PROBE)], generation=False)
            place = _shared(whole, other)
        body = _space_before(asked, whole[:place], turns[-2].content) + whole[place:]
    return _after_opening(turns[-1], body, opened) if opened else body


def _after_opening(turn: Message, body: str, opened: re.Match[str]) -> str:
    """An answer after a generation prompt that opens its reasoning, or opens and closes it."""
    thought, closed, _ = turn.content.partition("</think>")
    reasoning = turn.reasoning or (thought.replace("<think>", "", 1) if closed else "")
    body = body.rpartition("</think>")[2].lstrip("\n") if "</think>" in body or closed else body
    if opened["closed"]:
        return body
    # As templates that write empty reasoning have it: <think>\n\n</think>\n\n.
    line = "" if opened[0].endswith("\n") else "\n"
    return f"{line}{reasoning.strip()}\n</think>\n\n{body}"


def _space_before(asked: str, head: str, last: str) -> str:
    """The white space that an answer begins with, whose text in the whole conversation stands after `head`.

    Raises:
        TemplateError: what precedes the answer there is not how `asked`, which precedes it at generation, ends.
    """
    stem, written = asked.rstrip(), head.rstrip()
    end = stem[max(stem.rfind(last.strip()), 0) :]
    space, known = head[len(written) :], asked[len(stem) :]
    if not written.endswith(end) or not space.startswith(known):
        same = _shared(asked, head)
        raise TemplateError(
            f"where the chat template asks for an answer it writes {asked[same:][-60:]!r}, with which this answer does not "
            "begin; begin the answers so, use another template, or data.chat_template: false"
        )
    return space[len(known) :]


def _shared(text: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def _marked_place(tokenizer: Tokenizer, turns: Sequence[Message]) -> int | None:
    """Where the last answer begins by the template's `{% generation %}`; None where it has none."""
    messages, tools = _as_templates_take_it(turns)
    template = tokenizer.get_chat_template(None, tools)
    if not _MASK.search(template):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    # It is declared as a text, and with masks it is a pair.
    rendered: Any = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    _, spans = rendered
    return int(spans[0][-1][0]) if spans and spans[0] else None


def _cut_after_end(tokenizer: Tokenizer, answer: str) -> str:
    """The answer up to the special tokens that end it, each of them once.

    What the template writes after them, often a line break, is for it to write before the next turn; an end that stands there
    twice is one that the data spelled out.
    """
    named = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = "|".join(map(re.escape, sorted(named, key=len, reverse=True))) or re.escape(tokenizer.eos_token)
    found = re.search(rf"((?:{special})+)(?:\s|{special})*$", answer)
    if not found:
        return answer
    ends = re.findall(special, found[1])
    once = [token for token, _ in itertools.groupby(ends)]
    return answer[: found.end(1)] if once == ends else answer[: found.start()] + "".join(once)


def _check_context(tokenizer: Tokenizer, conversation: Sequence[Message]) -> None:
    """Refuse a template that leaves tools, calls or what tools answered out of what generation sees.

    Raises:
        TemplateError: naming the part.
    """
    *context, _ = conversation
    for index, turn in enumerate(context):
        for part, other in _altered(turn):
            if part == _REASONING:
                continue  # templates drop it from earlier answers on purpose
            changed = [*context[:index], other, *context[index + 1 :]]
            if render(tokenizer, changed, generation=True) == render(tokenizer, context, generation=True):
                raise TemplateError(_unknown(part))


def check_plain(conversation: Sequence[Message]) -> None:
    """Refuse what only a chat template can write.

    Raises:
        TemplateError: naming the part.
    """
    for part, _ in itertools.chain.from_iterable(map(_altered, conversation)):
        raise TemplateError(
            f"{part} can only be written by a chat template, which is not in use here; choose a base with one"
        )


_REASONING = "reasoning_content"


def _altered(turn: Message) -> list[tuple[str, Message]]:
    """The parts of a turn that a template may not know, each with the turn as it would be with another one."""
    if turn.role == TOOLS:
        tool = {"type": "function", "function": {"name": _PROBE, "description": _PROBE, "parameters": {}}}
        return [("tools", turn._replace(content=json.dumps([tool])))]
    found = []
    if turn.role == "tool":
        found.append(("role tool", turn._replace(content=turn.content + _PROBE)))
    if turn.tool_calls:
        first, *others = turn.tool_calls
        found.append(("tool_calls", turn._replace(tool_calls=(first._replace(name=first.name + _PROBE), *others))))
    if turn.reasoning:
        found.append((_REASONING, turn._replace(reasoning=turn.reasoning + _PROBE)))
    return found


def _unknown(part: str) -> str:
    hint = "write it into content as <think>...</think>, or " if part == _REASONING else ""
    return f"the base's chat template does not know {part}, and leaves it out; {hint}choose a base whose template does"


def _as_templates_take_it(conversation: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages and tools as transformers hands them to templates: arguments are objects, and no content is None."""
    messages: list[dict[str, Any]] = []
    tools: list[Any] | None = None
    for turn in conversation:
        if turn.role == TOOLS:
            tools = json.loads(turn.content)
            continue
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            message["content"] = turn.content or None
            message["tool_calls"] = [_as_dict(call) for call in turn.tool_calls]
        message |= {key: value for key in ("tool_call_id", "name") if (value := getattr(turn, key))}
        messages.append(message)
    return messages, tools


def _as_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})


def _refuse_bos(tokenizer: Tokenizer, conversation: Sequence[Message]) -> None:
    bos = tokenizer.bos_token
    if bos and any(turn.content.startswith(bos) for turn in conversation):
        raise TemplateError(
            f"a turn begins with {bos!r}, which is for the chat template to write; remove it, or set data.chat_template: false"
        )
